"""Operations that hold programs: loops, branches, mapped shards, functions with gradients of their own.

Each has a rule that walks the inner programs with the ids of its operands. What a loop carries keeps its
axes: ids out equal ids in. Whether a
carried value is zero when masked is assumed and then checked, until it holds for every turn. A scan over
stacked layers may lose a turn where that turn, masked, hands on its carry unchanged.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph._axes import Axes, joined, no_rule, passed_or_frozen
from jaxprune.graph._units import FROZEN, Facts
from jaxprune.graph._vanish import same_values
from jaxprune.program import Operation, Program, open_program, split_scan

Walk = Callable[[Program, list[Axes], Facts], tuple[Axes, ...]]


class Inner(NamedTuple):
    """A program within an operation.

    Attributes:
      program: its operations.
      axes: ids of its values.
    """

    program: Program
    axes: tuple[Axes, ...]


def inside(place: tuple[int, ...], which: int) -> tuple[int, ...]:
    """The place of the inner program `which` of the operation at `place`."""
    return (*place, -1 - which)


def _enter(walk: Walk, facts: Facts, which: int, program: Program, ins: list[Axes]) -> Inner:
    """Walks an inner program, and remembers it by its place."""
    place = facts.place
    facts.place = inside(place, which)
    inner = Inner(program, walk(program, ins, facts))
    facts.bodies[facts.place] = inner
    facts.place = place
    return inner


def _carried(facts: Facts, start: Axes) -> Axes:
    """A carried value: fresh ids, and zero where the start is. A known number is known no more."""
    ids = tuple(facts.fresh(n) if n > 1 else np.full(n, FROZEN) for n in start.shape)
    return Axes(ids, tuple(z | start.is_zero for z in start.zero))


def _settle(
    facts: Facts, start: list[Axes], turn: Callable[[list[Axes]], Inner]
) -> tuple[list[Axes], Inner]:
    """The carry of a loop, tied to itself, and the body walked with it."""
    carry = [_carried(facts, x) for x in start]
    while True:
        inner = turn(carry)
        results = [inner.axes[i] for i in inner.program.outputs[: len(carry)]]
        for values in zip(carry, start, results, strict=True):
            for a, b, c in zip(*(x.ids for x in values), strict=True):
                facts.equate(a, b)
                facts.equate(a, c)
        weaker = [
            Axes(x.ids, tuple(a & (b | y.is_zero) for a, b in zip(x.zero, y.zero, strict=True)))
            for x, y in zip(carry, results, strict=True)
        ]
        if all(
            (a == b).all()
            for x, y in zip(carry, weaker, strict=True)
            for a, b in zip(x.zero, y.zero, strict=True)
        ):
            return carry, inner
        carry = weaker


def scan_rule(walk: Walk) -> Callable[..., list[Axes]]:
    """Recurrent networks, whose carry is coupled with itself, and stacked layers."""

    def rule(
        facts: Facts, params: Any, source: str, ins: list[Axes], outs: list[tuple[int, ...]]
    ) -> list[Axes]:
        program = open_program(params["jaxpr"])
        n_consts, n_carry = split_scan(params)
        first, length = n_consts + n_carry, params["length"]
        if len(program.inputs) != len(ins) or not length:
            return no_rule(facts, params, source, ins, outs, "scan")
        consts, scanned = ins[:n_consts], ins[first:]
        slices = [Axes(x.ids[1:], x.zero[1:], x.value) for x in scanned]
        turn = lambda carry: _enter(walk, facts, 0, program, [*consts, *carry, *slices])
        carry, inner = _settle(facts, ins[n_consts:first], turn)
        masked = _masked_turn(walk, program, consts, carry, scanned)
        passes = scanned and all(
            masked.same.get(out, out) == into
            for out, into in zip(program.outputs, program.inputs[n_consts:first], strict=False)
        )
        turns, vanish = np.full(length, FROZEN), np.zeros(length, bool)
        if passes:
            turns = facts.fresh(length)
            facts.turns.append(turns)
            for x in scanned:
                facts.equate(turns, x.ids[0])
        else:
            reason = f"scanned over at {source}, where a masked turn changes what is carried"
            for x in scanned:
                facts.freeze(x.ids[0], reason)
        stacked = []
        for number in program.outputs[n_carry:]:
            x = inner.axes[number]
            flags = (vanish | masked.axes[number].is_zero) if passes else vanish
            stacked.append(Axes((turns, *x.ids), (flags, *x.zero)))
        return [*carry, *stacked]

    return rule


class _Masked(NamedTuple):
    axes: tuple[Axes, ...]
    same: dict[int, int]


def _masked_turn(
    walk: Walk, program: Program, consts: list[Axes], carry: list[Axes], scanned: list[Axes]
) -> _Masked:
    """What a turn does once its slices are masked: values that vanish or stay as they were."""
    blank = [Axes(x.ids[1:], x.zero[1:], 0.0 if x.zero[0].all() else x.value) for x in scanned]
    scratch = Facts()
    axes = walk(program, [*consts, *carry, *blank], scratch)
    return _Masked(axes, same_values(program, axes))


def while_rule(walk: Walk) -> Callable[..., list[Axes]]:
    """A loop with a condition; what decides about another turn must see the same numbers."""

    def rule(
        facts: Facts, params: Any, source: str, ins: list[Axes], outs: list[tuple[int, ...]]
    ) -> list[Axes]:
        test, body = open_program(params["cond_jaxpr"]), open_program(params["body_jaxpr"])
        a = params["cond_nconsts"]
        b = a + params["body_nconsts"]
        turn = lambda carry: _enter(walk, facts, 1, body, [*ins[a:b], *carry])
        carry, _ = _settle(facts, ins[b:], turn)
        decided = _enter(walk, facts, 0, test, [*ins[:a], *carry])
        for ids in decided.axes[test.outputs[0]].ids:
            facts.freeze(ids, f"decides about a loop at {source}")
        return carry

    return rule


def cond_rule(walk: Walk) -> Callable[..., list[Axes]]:
    """Branches: they agree about the axes of what they return."""

    def rule(
        facts: Facts, params: Any, source: str, ins: list[Axes], outs: list[tuple[int, ...]]
    ) -> list[Axes]:
        found = []
        for which, branch in enumerate(params["branches"]):
            inner = _enter(walk, facts, which, open_program(branch), ins[1:])
            found.append([inner.axes[i] for i in inner.program.outputs])
        results = []
        for values in zip(*found, strict=True):
            ids, zero = joined(facts, list(values), range(len(values[0].ids)))
            known = 0.0 if all(x.is_zero for x in values) else None
            results.append(Axes(tuple(ids), tuple(zero), known))
        return results

    return rule


def custom_rule(walk: Walk) -> Callable[..., list[Axes]]:
    """A function with a gradient of its own: walked open, run closed."""

    def rule(
        facts: Facts, params: Any, source: str, ins: list[Axes], outs: list[tuple[int, ...]]
    ) -> list[Axes]:
        inner = _enter(walk, facts, 0, open_program(params["call_jaxpr"]), ins)
        return [inner.axes[i] for i in inner.program.outputs]

    return rule


def shard_rule(walk: Walk) -> Callable[..., list[Axes]]:
    """A function mapped over shards: axes that are not split pass; those that are stay."""

    def rule(
        facts: Facts, params: Any, source: str, ins: list[Axes], outs: list[tuple[int, ...]]
    ) -> list[Axes]:
        program = open_program(params["jaxpr"])
        if len(program.inputs) != len(ins):
            return no_rule(facts, params, source, ins, outs, "shard_map")
        reason = f"split over devices by shard_map at {source}"
        numbers = program.inputs
        local = [
            _divided(facts, x, spec, tuple(program.avals[number].shape), reason)
            for x, spec, number in zip(ins, params["in_specs"], numbers, strict=True)
        ]
        inner = _enter(walk, facts, 0, program, local)
        results = [inner.axes[number] for number in program.outputs]
        return [
            replace(_divided(facts, x, spec, shape, reason), value=None)
            for x, spec, shape in zip(results, params["out_specs"], outs, strict=True)
        ]

    return rule


def _divided(facts: Facts, x: Axes, spec: Any, shape: tuple[int, ...], reason: str) -> Axes:
    """A value on the other side of a split over devices, of `shape` there: split axes freeze."""
    passes = [entry is None for entry in _entries(spec, len(shape))]
    return replace(passed_or_frozen(facts, x, shape, passes, reason), value=x.value)


def _entries(spec: Any, rank: int) -> list[Any]:
    given = list(spec)
    return [*given, *[None] * (rank - len(given))]


RULES: dict[str, Callable[[Walk], Callable[..., list[Axes]]]] = {
    "scan": scan_rule,
    "while": while_rule,
    "cond": cond_rule,
    "custom_vjp_call": custom_rule,
    "shard_map": shard_rule,
}
"""Rules, given the walk over a program."""


def scanned_ids(operation: Operation, axes: tuple[Axes, ...]) -> np.ndarray | None:
    """The ids of the turns of a scan, where it runs over anything."""
    if operation.primitive.name != "scan":
        return None
    slices = operation.ins[sum(split_scan(operation.params)) :]
    return axes[slices[0]].ids[0] if slices else None
