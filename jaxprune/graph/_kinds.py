"""What units are, read off the program: heads, neurons, experts, features of a stream.

A *weight* is made of parameters without a product or a look-up; all else is *computed*. A product of two
computed values whose result meets an exponential before it multiplies a third is attention: what both
share side by side are heads, what it sums over are their dimensions. Nothing is guessed from names.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._constraints import Solution, may_shrink
from jaxprune.graph._groups import Group
from jaxprune.program import Flow, Kind, Operation, primitive, programs_in, split_scan

KINDS = (
    "stream",
    "heads",
    "kv heads",
    "queries per kv head",
    "head dim",
    "neurons",
    "channels",
    "experts",
    "states",
    "layers",
)
_NONE: frozenset[int] = frozenset()
Axes = tuple[list[int], list[int]]


def kinds_of(
    flow: Flow,
    axes: Sequence[AxisInfo],
    solution: Solution,
    groups: Sequence[Group],
    states: Iterable[int],
) -> list[str]:
    """The kind of each group.

    Args:
      flow: of the program.
      axes: of each value.
      solution: of the constraints.
      groups: whose kind is `"layers"` where it is known already.
      states: numbers of the values that come in as states.
    """
    found = _Evidence(flow, axes, solution, groups)
    found.read_products()
    found.read_residuals()
    found.read_carries(states)
    return [found.kind(i, group) for i, group in enumerate(groups)]


class _Evidence:
    """What axes of each group do in the program; sets hold numbers of groups."""

    def __init__(
        self,
        flow: Flow,
        axes: Sequence[AxisInfo],
        solution: Solution,
        groups: Sequence[Group],
    ) -> None:
        self.flow, self.axes, self.solution = flow, axes, solution
        self.owner = np.full(len(solution.reason), -1)
        for i, group in enumerate(groups):
            self.owner[group.units] = i
        self.known: dict[int, frozenset[int]] = {}
        self.computed = _computed(flow)
        names = "heads", "kv", "queries", "dims", "batched", "inner", "experts", "read", "summed"
        self.sets: dict[str, set[int]] = {name: set() for name in names}
        self.convolutions, self.dots = np.zeros(len(groups), int), np.zeros(len(groups), int)
        self.residuals, self.carried = set[int](), set[int]()
        self.carried_alone, self.recurrent = set[int](), set[int]()

    def on(self, number: int, which: Iterable[int]) -> frozenset[int]:
        """The groups whose units lie on some axes of a value."""
        return _NONE.union(*(self._of(self.axes[number].ids[axis]) for axis in which))

    def _of(self, ids: np.ndarray) -> frozenset[int]:
        if id(ids) not in self.known:
            found = _NONE
            if len(ids) > 1 and may_shrink(ids):
                _, units = self.solution.factors(np.unique(self.solution.label[ids]))
                found = frozenset(self.owner[units].tolist()) - {-1}
            self.known[id(ids)] = found
        return self.known[id(ids)]

    def sides(self, number: int, which: Iterable[int]) -> tuple[frozenset[int], frozenset[int]]:
        """The groups that are outer and inner parts of axes."""
        outer, inner = set[int](), set[int]()
        for axis in which:
            parts = np.unique(self.solution.label[self.axes[number].ids[axis]])
            for found, side in ((outer, self.solution.row), (inner, self.solution.column)):
                units = side[parts][side[parts] >= 0]
                found.update(self.owner[self.solution.factors(units)[1]].tolist())
        return frozenset(outer - {-1}), frozenset(inner - {-1})

    def read_products(self) -> None:
        """What products and convolutions say, those of weights and those of attention."""
        scored: dict[int, frozenset[int]] = {}  # products that a value comes from
        soft: dict[int, frozenset[int]] = {}  # likewise, through an exponential
        attention, mixed = set[int](), []
        for index, op in enumerate(self.flow.operations):
            if primitive(op.name).kind is Kind.PRODUCT:
                sides = [i in self.computed for i in op.ins[:2]]
                met = [soft.get(i, _NONE) for i in op.ins[:2]]
                if all(sides):
                    mixed.append((index, op, met))
                    attention |= met[0] | met[1]
                else:
                    self._weigh(op, sides)
                scored |= dict.fromkeys(op.outs, frozenset([index]))
                continue
            before = _NONE.union(*(scored.get(i, _NONE) for i in op.ins))
            after = _NONE.union(*(soft.get(i, _NONE) for i in op.ins))
            if primitive(op.name).is_exponential:
                after |= before
            if before or after:
                scored |= dict.fromkeys(op.outs, before)
                soft |= dict.fromkeys(op.outs, after)
        routers = {i for i in attention if not self._is_mixed(self.flow.operations[i])}
        for index, op, met in mixed:
            self._mix(op, met, is_scores=index in attention, routers=routers)

    def _is_mixed(self, op: Operation) -> bool:
        return all(i in self.computed for i in op.ins[:2])

    def _roles(self, op: Operation) -> tuple[Axes, Axes, Axes]:
        return _roles(op, [len(self.axes[i].ids) for i in op.ins[:2]])

    def _weigh(self, op: Operation, sides: Sequence[bool]) -> None:
        """A product with a weight."""
        summed, side_by_side, free = self._roles(op)
        for which in (0, 1):
            if sides[which]:
                continue
            number = op.ins[which]
            touched = self.on(number, [*summed[which], *free[which]])
            count = self.convolutions if op.name.startswith("conv") else self.dots
            count[list(touched)] += 1
            self.sets["read"] |= self.on(number, summed[which])
            self.sets["experts"] |= self.on(number, side_by_side[which])

    def _mix(self, op: Operation, met: Any, *, is_scores: bool, routers: set[int]) -> None:
        """A product of two computed values."""
        if op.name.startswith(("conv", "ragged")):
            return
        summed, side_by_side, free = self._roles(op)
        contracted = self.on(op.ins[0], summed[0])
        weighs = [which for which in (0, 1) if met[which]]
        heads = self.on(op.ins[0], side_by_side[0]) | self.on(op.ins[1], side_by_side[1])
        if met[0] | met[1] and not (met[0] | met[1]) - routers:
            for i in met[0] | met[1]:  # what routes chooses among what it sums over
                out = self.flow.operations[i].outs[0]
                self.sets["experts"] |= contracted & self.on(out, range(len(self.axes[out].ids)))
            weighs = []
        if is_scores or weighs:
            queries = self.on(op.ins[0], free[0]) | self.on(op.ins[1], free[1])
            dims = contracted
            if weighs:
                other = 1 - weighs[0]
                dims = self.on(op.ins[other], free[other])
                queries = self.on(op.ins[weighs[0]], free[weighs[0]])
            self._attend(op, side_by_side, heads, queries, dims)
        else:
            self.sets["summed"] |= contracted
            if heads and summed[0]:
                rest = [self.on(i, f) for i, f in zip(op.ins, free, strict=False)]
                self.sets["batched"] |= heads
                self.sets["inner"] |= contracted.union(*rest) - heads

    def _attend(self, op: Operation, batch: Any, heads: Any, queries: Any, dims: Any) -> None:
        self.sets["heads"] |= heads
        self.sets["dims"] |= dims - heads
        queries = queries & self.sets["read"] - dims - heads
        self.sets["queries"] |= queries
        if queries:
            self.sets["kv"] |= heads
        for number, which in zip(op.ins, batch, strict=False):
            outer, inner = self.sides(number, which)  # keys repeated for several queries
            self.sets["kv"] |= outer - inner
            self.sets["queries"] |= inner - outer

    def read_residuals(self) -> None:
        """Sums of a value and what was computed from it."""
        pairs = []
        for op in self.flow.operations:
            known = primitive(op.name)
            if known.neutral != 0 or not known.commutes or not self.computed.issuperset(op.ins):
                continue
            if self.on(op.outs[0], range(len(self.axes[op.outs[0]].ids))):
                pairs.append((op, [self.flow.root(i) for i in op.ins]))
        bit = {n: 1 << i for i, n in enumerate(dict.fromkeys(n for _, r in pairs for n in r))}
        before: dict[int, int] = {}  # per value the operands of sums that it comes from, as bits
        weighed: dict[int, int] = {}  # those that a weight lies between
        for op in self.flow.operations:
            own = passed = 0
            for i in op.ins:
                own |= before.get(i, 0) | bit.get(i, 0)
                passed |= weighed.get(i, 0)
            if primitive(op.name).kind is Kind.PRODUCT:
                passed = own
            if own:
                before |= dict.fromkeys(op.outs, own)
                weighed |= dict.fromkeys(op.outs, passed)
        for op, roots in pairs:
            for a, b in (roots, roots[::-1]):
                if weighed.get(b, 0) & bit[a]:
                    number = op.outs[0]
                    self.residuals |= self.on(number, range(len(self.axes[number].ids)))

    def read_carries(self, states: Iterable[int]) -> None:
        """What loops over inputs carry from step to step, and states."""
        for number in states:
            self._carry(number)
        for program in programs_in(self.flow.program):
            for op in program.operations:
                if op.name not in ("scan", "while") or not op.inner:
                    continue
                inner, start, n_carry = op.inner[-1], 0, len(op.outs)
                if op.name == "scan":
                    start, n_carry = split_scan(op.params)
                    if any(i not in self.computed for i in op.ins[start + n_carry :]):
                        continue  # layers, whose carry is a stream
                    first = start
                else:
                    start, first = op.params["body_nconsts"], len(op.ins) - n_carry
                for k in range(n_carry):
                    if self.flow.leaf(op.ins[first + k]) is None:
                        self.recurrent |= self._carry(inner.inputs[start + k])

    def _carry(self, number: int) -> frozenset[int]:
        """Notes what lies on a value that is carried; the groups that do so alone."""
        on = self.on(number, range(len(self.axes[number].ids)))
        self.carried |= on
        if len(on) == 1:
            self.carried_alone |= on
        return on if len(on) == 1 else _NONE

    def kind(self, i: int, group: Group) -> str:
        """The kind of a group, by what says most."""
        if group.kind == "layers":
            return "layers"
        has = {name for name, members in self.sets.items() if i in members}
        is_state = i in self.carried and (i in self.carried_alone or "read" not in has)
        many = self.convolutions[i] >= self.dots[i] or i not in self.residuals
        ranked = (
            ("queries" in has, "queries per kv head"),
            ("kv" in has, "kv heads"),
            ("heads" in has, "heads"),
            ("dims" in has and i not in self.recurrent, "head dim"),
            (is_state, "states"),
            ("batched" in has, "heads"),
            ("experts" in has, "experts"),
            ("inner" in has, "head dim"),
            ("summed" in has and "read" not in has, "states"),
            (bool(self.convolutions[i] and many), "channels"),
            (i in self.residuals, "stream"),
        )
        return next((kind for holds, kind in ranked if holds), "neurons")


def _computed(flow: Flow) -> frozenset[int]:
    """Values that inputs reach, or that come of products or look-ups."""
    found = set(flow.data)
    for op in flow.operations:
        made = primitive(op.name).kind in (Kind.PRODUCT, Kind.LOOKUP)
        if made or not found.isdisjoint(op.ins):
            found.update(op.outs)
    return frozenset(found)


def _roles(op: Operation, ranks: Sequence[int]) -> tuple[Axes, Axes, Axes]:
    """Per operand the axes that are summed over, go side by side, and are free; none of space."""
    if op.name == "conv_general_dilated":
        spec = op.params["dimension_numbers"]
        return ([spec.lhs_spec[1]], [spec.rhs_spec[1]]), ([], []), ([], [spec.rhs_spec[0]])
    ragged = op.params.get("ragged_dot_dimension_numbers")
    numbers = ragged.dot_dimension_numbers if ragged else op.params["dimension_numbers"]
    (lc, rc), (lb, rb) = ([list(axes) for axes in pair] for pair in numbers)
    rb += list(ragged.rhs_group_dimensions) if ragged else []
    left = [i for i in range(ranks[0]) if i not in (*lc, *lb)]
    right = [i for i in range(ranks[1]) if i not in (*rc, *rb)]
    return (lc, rc), (lb, rb), (left, right)
