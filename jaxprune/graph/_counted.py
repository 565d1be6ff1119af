"""Sums that count what is removed: entries that are no zeros when masked, but all the same.

The variance of a norm sums `(x - mean)**2`: a masked channel holds the square of the mean there, as all
masked channels do. Such a sum runs over what is left, and adds one of the removed entries as often as
there are such: the *stand-in*. Operations make it of the stand-ins of their operands, with axes of one
entry in place of those that shrink.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._shapes import axes_kept
from jaxprune.program import Kind, Operation, Program, primitive

Kept = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Derived:
    """What stands for a primitive in operations that were not traced.

    Attributes:
      name: for messages.
      run: `(shape, operands) -> result`, given the shape that is left of the result.
    """

    name: str
    run: Callable[[tuple[Any, ...], list[Any]], Any]


def counted(
    program: Program,
    axes: tuple[AxisInfo, ...],
    zero: frozenset[int],
    kept: list[Kept],
    full: list[tuple[int, ...]],
) -> tuple[Program, frozenset[int], list[Kept], list[tuple[int, ...]]]:
    """A program whose sums count what is removed, and what is known of its values, new ones too.

    Args:
      program: that will run on what is left.
      axes: ids of each value.
      zero: values that are zero throughout.
      kept: per value and axis the indices that are left.
      full: per value its full shape.
    """
    values = _Values(axes, zero, list(program.avals), list(kept), list(full))
    found = _rewritten(program, values)
    return found, zero, values.kept, values.full


def _rewritten(program: Program, values: "_Values") -> Program:
    body = _Body(values)
    for operation in program.operations:
        inner = tuple(_rewritten(part, values) for part in operation.inner)
        if any(a is not b for a, b in zip(inner, operation.inner, strict=True)):
            operation, body.is_new = replace(operation, inner=inner), True
        if cut := body.uncounted(operation):
            body.reduce(operation, frozenset(), cut, operation.outs[0])
            body.is_new = True
        else:
            body.operations.append(operation)
        body.made.update(dict.fromkeys(operation.outs, operation))
    if not body.is_new:
        return program
    return replace(program, avals=values.avals, operations=body.operations)


@dataclass
class _Values:
    """What is known of values; grows with the new ones."""

    axes: tuple[AxisInfo, ...]
    zero: frozenset[int]
    avals: list[Any]
    kept: list[Kept]
    full: list[tuple[int, ...]]

    def new(self, like: int, along: frozenset[int]) -> int:
        """A value like another, with one entry along some axes."""
        ones = lambda whole, one: tuple(one if axis in along else x for axis, x in enumerate(whole))
        aval = self.avals[like]
        self.avals.append(jax.ShapeDtypeStruct(ones(aval.shape, 1), aval.dtype))
        self.kept.append(ones(self.kept[like], np.zeros(1, int)))
        self.full.append(ones(self.full[like], 1))
        return len(self.avals) - 1

    def removed(self, number: int, axis: int) -> np.ndarray:
        """Which indices of an axis are removed."""
        gone = np.ones(self.full[number][axis], bool)
        gone[self.kept[number][axis]] = False
        return gone

    def is_zero(self, number: int, axis: int) -> bool:
        """Whether all that is removed along an axis holds zeros."""
        return number in self.zero or bool(
            (self.axes[number].zero[axis] | ~self.removed(number, axis)).all()
        )


class _Body:
    """The operations of one program as they are rewritten."""

    def __init__(self, values: _Values) -> None:
        self.values = values
        self.operations: list[Operation] = []
        self.made: dict[int, Operation] = {}
        self.is_new = False
        self._known: dict[tuple[int, frozenset[int]], int] = {}

    def uncounted(self, operation: Operation) -> list[int]:
        """The axes of which a sum has to count what is removed."""
        if operation.name != "reduce_sum":
            return []
        number = operation.ins[0]
        return [
            axis
            for axis in operation.params["axes"]
            if self.values.removed(number, axis).any() and not self.values.is_zero(number, axis)
        ]

    def reduce(
        self, operation: Operation, along: frozenset[int], cut: list[int], result: int
    ) -> None:
        """A reduction of what is left, and of stand-ins as often as there are such, as value `result`.

        Args:
          operation: the reduction.
          along: axes, of those that it leaves, along which the result is a stand-in already.
          cut: axes of the operand to count; none but of sums.
          result: number of the result.
        """
        values, number = self.values, operation.ins[0]
        parts, counts = [], []
        for chosen in (c for n in range(len(cut) + 1) for c in combinations(cut, n)):
            operand = self.stand_in(number, along | frozenset(chosen))
            parts.append(values.new(result, frozenset()))
            counts.append(int(np.prod([values.removed(number, axis).sum() for axis in chosen])))
            self.operations.append(replace(operation, ins=(operand,), outs=(parts[-1],)))
        add = lambda _, xs: sum(
            x * jnp.asarray(np.asarray(n).astype(x.dtype)) for x, n in zip(xs, counts, strict=True)
        )
        self._derive("add", add, operation, tuple(parts), result)

    def stand_in(self, number: int, along: frozenset[int]) -> int:
        """The value that all removed entries of `number` hold along some axes, by its number."""
        if not along:
            return number
        if (number, along) not in self._known:
            self._known[number, along] = self._stand_in(number, along)
        return self._known[number, along]

    def _stand_in(self, number: int, along: frozenset[int]) -> int:
        values, operation = self.values, self.made.get(number)
        if operation is not None and operation.name == "sharding_constraint":
            return self.stand_in(operation.ins[0], along)
        result = values.new(number, along)
        known, dtype = values.axes[number].value, values.avals[number].dtype
        if any(values.is_zero(number, axis) for axis in along):
            known = 0
        if known is not None:
            full = lambda shape, _: jnp.full(shape, known, dtype)
            self._derive("full", full, operation, (), result)
        elif operation is None:
            raise AssertionError(f"no operation made value {number}, whose removed entries count")
        elif operation.name == "broadcast_in_dim":
            where = operation.params["broadcast_dimensions"]
            below = {axis for axis, to in enumerate(where) if to in along}
            ins = (self._stretched(operation.ins[0], below, number, dict(enumerate(where))),)
            run = lambda shape, xs: jax.lax.broadcast_in_dim(xs[0], shape, where)
            self._derive("broadcast", run, operation, ins, result)
        elif operation.name in ("reshape", "expand_dims", "squeeze"):
            order = operation.params.get("dimensions") if operation.name == "reshape" else None
            run = lambda shape, xs: jax.lax.reshape(xs[0], shape, order)
            self._derive("reshape", run, operation, (self._through(operation, along),), result)
        elif operation.name == "transpose":
            order = operation.params["permutation"]
            ins = (self.stand_in(operation.ins[0], frozenset(order[axis] for axis in along)),)
            self.operations.append(replace(operation, ins=ins, outs=(result,)))
        elif primitive(operation.name).kind is Kind.REDUCTION:
            gone = operation.params["axes"]
            left = [i for i in range(len(values.full[operation.ins[0]])) if i not in gone]
            below = frozenset(left[axis] for axis in along)
            self.reduce(operation, below, self.uncounted(operation), result)
        else:
            assert primitive(operation.name).kind in (Kind.IDENTITY, Kind.CAST, Kind.ELEMENTWISE)
            same = {axis: axis for axis in range(len(values.full[number]))}
            ins = tuple(self._stretched(i, set(along), number, same) for i in operation.ins)
            self.operations.append(replace(operation, ins=ins, outs=(result,)))
        return result

    def _stretched(self, operand: int, axes: set[int], result: int, to: dict[int, int]) -> int:
        """An operand of an operation, as a stand-in along those of `axes` that it has whole.

        `to`: its axes as axes of the result.
        """
        full = self.values.full
        whole = (
            axis
            for axis in axes
            if axis < len(full[operand]) and full[operand][axis] == full[result][to[axis]]
        )
        return self.stand_in(operand, frozenset(whole))

    def _through(self, operation: Operation, along: frozenset[int]) -> int:
        """The operand of a reshape, as a stand-in along the axes that became `along`."""
        (operand,), (result,) = operation.ins[:1], operation.outs
        full = self.values.full
        order = operation.params.get("dimensions") if operation.name == "reshape" else None
        order = range(len(full[operand])) if order is None else order
        twins = axes_kept(tuple(full[operand][i] for i in order), full[result])
        return self.stand_in(
            operand, frozenset(order[axis] for axis, to in twins.items() if to in along)
        )

    def _derive(
        self,
        name: str,
        run: Callable[[tuple[Any, ...], list[Any]], Any],
        operation: Operation | None,
        ins: tuple[int, ...],
        result: int,
    ) -> None:
        source = operation.source if operation is not None else ""
        self.operations.append(Operation(Derived(name, run), {}, ins, (result,), source))
