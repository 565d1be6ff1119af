"""Running a program at smaller sizes: each operation on what is left of its operands.

Most primitives take their sizes from their operands and run as they are. Those whose parameters name
sizes have a rule here.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._counted import Derived, counted
from jaxprune.graph._nested import nested_rule
from jaxprune.graph._zeros import Work
from jaxprune.program import (
    PRIMITIVES,
    Executor,
    HookResult,
    Operation,
    Program,
    Step,
    run_operation,
)

Kept = tuple[np.ndarray, ...]  # per axis the indices that are left


class Plan(NamedTuple):
    """A program and what is left of its values, those of inner programs included.

    Attributes:
      program: the operations that run, on the values that their operands stand for.
      zero: values that are zero throughout.
      kept: per value and axis the indices that are left.
      full: per value its full shape, with numbers in place of symbolic sizes.
    """

    program: Program
    zero: frozenset[int]
    kept: list[Kept]
    full: list[tuple[int, ...]]

    def shape(self, number: int) -> tuple[Any, ...]:
        """The shape that is left of a value; symbolic sizes stay, whole or in proportion."""
        sizes = zip(
            self.program.avals[number].shape, self.full[number], self.kept[number], strict=False
        )
        return tuple(
            n if len(index) == full else len(index) if n == full else n * len(index) // full
            for n, full, index in sizes
        )

    def is_whole(self, number: int) -> bool:
        """Whether nothing of a value is removed."""
        pairs = zip(self.kept[number], self.full[number], strict=True)
        return all(len(index) == n for index, n in pairs)


def plan_of(program: Program, axes: tuple[AxisInfo, ...], removed: np.ndarray, work: Work) -> Plan:
    """How to run a program without the removed ids."""
    kept = [tuple(np.flatnonzero(~removed[i]) for i in x.ids) for x in axes]
    stands_for = lambda numbers: tuple(work.same.get(i, i) for i in numbers)
    operations = [replace(op, ins=stands_for(op.ins)) for op in work.operations]
    outputs = list(stands_for(program.outputs))
    read = work.zero.intersection({*outputs, *(i for op in operations for i in op.ins)})
    left = replace(
        program,
        operations=operations,
        outputs=outputs,
        constants={**program.constants, **dict.fromkeys(read)},
    )
    plan = Plan(left, work.zero, kept, [x.shape for x in axes])
    return Plan(*counted(left, axes, plan.zero, plan.kept, plan.full))


def evaluate(plan: Plan, inputs: list[Any]) -> list[Any]:
    """The program's outputs, from arguments of which the parameters have their small size."""

    def constant(number: int, value: Any) -> Any:
        if number in plan.zero:
            return jnp.zeros(plan.shape(number), plan.program.avals[number].dtype)
        return _cut(value, plan.kept[number])

    run = Executor(partial(_smaller, plan), enters=lambda operation: True, constant=constant)
    return run.run(plan.program, inputs)[0]


def _smaller(plan: Plan, step: Step) -> HookResult:
    """An operation on what is left of its operands; inner programs are entered, but for functions with
    gradients of their own.
    """
    operation = step.operation
    if isinstance(operation.primitive, Derived):
        shape = plan.shape(operation.outs[0])
        return HookResult([operation.primitive.run(shape, step.operands)])
    if operation.name == "custom_vjp_call":
        return HookResult(_at_full_size(plan, operation, step.operands))
    if operation.inner and nested_rule(operation) is not None:
        return HookResult()
    return HookResult(_apply(plan, operation, step.operands))


def _at_full_size(plan: Plan, operation: Operation, operands: list[Any]) -> list[Any]:
    """Operands spread to their full size, zeros between, and the results cut."""
    full = [_spread(x, plan, i) for x, i in zip(operands, operation.ins, strict=True)]
    outs = run_operation(operation, full)
    return [_cut(x, plan.kept[i]) for x, i in zip(outs, operation.outs, strict=True)]


def _spread(x: Any, plan: Plan, number: int) -> Any:
    if plan.is_whole(number):
        return x
    aval = plan.program.avals[number]
    return jnp.zeros(aval.shape, aval.dtype).at[np.ix_(*plan.kept[number])].set(x)


def _cut(value: Any, kept: Kept) -> Any:
    for axis, index in enumerate(kept):
        if len(index) < np.shape(value)[axis]:
            value = jnp.take(value, index, axis=axis)
    return value


def _apply(plan: Plan, operation: Operation, operands: list[Any]) -> list[Any]:
    numbers, shapes = operation.outs, [plan.shape(i) for i in operation.outs]
    if numbers and all(0 in shape for shape in shapes) and not operation.effects:
        dtypes = [plan.program.avals[i].dtype for i in numbers]
        return [jnp.zeros(*item) for item in zip(shapes, dtypes, strict=True)]
    less_in, less_out = (
        not all(plan.is_whole(i) for i in group) for group in (operation.ins, numbers)
    )
    rule = RULES.get(operation.name)
    if rule is not None and (less_in or less_out):
        result = rule(Sides(plan, operation), operands)
        return result if isinstance(result, list) else [result]
    outs = run_operation(operation, operands)
    # what is made from nothing, such as random bits, is made whole and cut
    return (
        [_cut(x, plan.kept[i]) for x, i in zip(outs, numbers, strict=True)]
        if less_out and not less_in
        else outs
    )


class Sides(NamedTuple):
    """An operation, and what is left on both sides of it."""

    plan: Plan
    operation: Operation

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the operation at full size."""
        return self.operation.params

    @property
    def before(self) -> Kept:
        """Per axis of the first operand the indices that are left."""
        return self.plan.kept[self.operation.ins[0]]

    @property
    def after(self) -> Kept:
        """Likewise of the first result."""
        return self.plan.kept[self.operation.outs[0]]

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the first result."""
        return self.plan.shape(self.operation.outs[0])

    def is_cut(self, axis: int) -> bool:
        """Whether the first operand lost indices of an axis."""
        return len(self.before[axis]) < self.plan.full[self.operation.ins[0]][axis]

    def bind(self, operands: list[Any], **changes: Any) -> Any:
        """The operation with some other parameters."""
        return self.operation.primitive.bind(*operands, **{**self.params, **changes})


def _broadcast(sides: Sides, operands: list[Any]) -> Any:
    return jax.lax.broadcast_in_dim(operands[0], sides.shape, sides.params["broadcast_dimensions"])


def _reshape(sides: Sides, operands: list[Any]) -> Any:
    return jax.lax.reshape(operands[0], sides.shape, sides.params.get("dimensions"))


def _iota(sides: Sides, operands: list[Any]) -> Any:
    axis = sides.params["dimension"]
    index = jnp.asarray(sides.after[axis], sides.params["dtype"])
    return jax.lax.broadcast_in_dim(index, sides.shape, (axis,))


def _slice(sides: Sides, operands: list[Any]) -> Any:
    params, x = sides.params, operands[0]
    strides = params["strides"] or (1,) * len(params["start_indices"])
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    for axis, (start, limit, stride) in enumerate(cuts):
        if sides.is_cut(axis):
            index = sides.before[axis]
            inside = (index >= start) & (index < limit) & ((index - start) % stride == 0)
            x = x if inside.all() else _along(x, np.flatnonzero(inside), axis)
            cuts[axis] = (0, x.shape[axis], 1)
    return jax.lax.slice(x, *zip(*cuts, strict=True))


def _along(x: Any, index: np.ndarray, axis: int) -> Any:
    """The entries at some indices, by a slice where they are consecutive."""
    if len(index) and (np.diff(index) == 1).all():
        return jax.lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, axis=axis)
    return jnp.take(x, index, axis=axis)


def _split(sides: Sides, operands: list[Any]) -> Any:
    plan, axis = sides.plan, sides.params["axis"]
    return sides.bind(operands, sizes=tuple(plan.shape(i)[axis] for i in sides.operation.outs))


def _conv(sides: Sides, operands: list[Any]) -> Any:
    spec, groups = sides.params["dimension_numbers"], sides.params["feature_group_count"]
    lhs, rhs = operands
    if 0 in np.shape(lhs) or 0 in np.shape(rhs):
        return jnp.zeros(sides.shape, sides.params["preferred_element_type"] or lhs.dtype)
    if groups > 1:
        groups = lhs.shape[spec.lhs_spec[1]] // rhs.shape[spec.rhs_spec[1]]
    return sides.bind(operands, feature_group_count=groups)


def _renumbered(sides: Sides, axis: int, index: Any) -> Any:
    """Indices into what is left of an axis, for indices into all of it; those beyond it stay beyond."""
    n, left = sides.plan.full[sides.operation.ins[0]][axis], sides.before[axis]
    place = jnp.asarray(np.searchsorted(left, np.arange(n)), index.dtype)
    beyond = jnp.where(index < 0, index, index - n + len(left))
    return jnp.where((index >= 0) & (index < n), place[jnp.clip(index, 0, n - 1)], beyond)


def _scatter(sides: Sides, operands: list[Any]) -> Any:
    spec = sides.params["dimension_numbers"]
    (axis, *more), (x, index, new) = spec.scatter_dims_to_operand_dims or (0, 0), operands
    if not more and axis in spec.inserted_window_dims and sides.is_cut(axis):
        index = _renumbered(sides, axis, index)
    return sides.bind([x, index, new])


def _named(sides: Sides, axis: int, index: Any) -> Any:
    """Indices into all of an axis, for indices into what is left of it. Inverse of `_renumbered`."""
    return jnp.asarray(sides.before[axis], index.dtype)[index]


def _argmax(sides: Sides, operands: list[Any]) -> Any:
    axis = sides.params["axes"][0]
    index = sides.bind(operands)
    return _named(sides, axis, index) if sides.is_cut(axis) else index


def _top_k(sides: Sides, operands: list[Any]) -> Any:
    rank = len(sides.before)
    axis = sides.params.get("axis", sides.params.get("reduction_dimension", -1)) % rank
    wanted, left = sides.shape[axis], len(sides.before[axis])
    if wanted > left:
        raise ValueError(
            f"compact: the {wanted} largest of {left} at {sides.operation.source}: as many experts have "
            f"to stay as each token is given to; keep {wanted} of them (unit_masks: min_units={wanted})"
        )
    values, index = sides.bind(operands)
    return [values, _named(sides, axis, index) if sides.is_cut(axis) else index]


def _gather(sides: Sides, operands: list[Any]) -> Any:
    full = sides.plan.full[sides.operation.ins[0]]
    spec = sides.params["dimension_numbers"]
    (axis, *more), (x, index) = spec.start_index_map or (0, 0), operands
    if not more and axis in spec.collapsed_slice_dims and sides.is_cut(axis):
        operands = [x, _renumbered(sides, axis, index)]
    sizes = tuple(
        len(index) if sides.is_cut(axis) and size == full[axis] else size
        for axis, (index, size) in enumerate(
            zip(sides.before, sides.params["slice_sizes"], strict=True)
        )
    )
    return sides.bind(operands, slice_sizes=sizes)


def _dynamic_slice(sides: Sides, operands: list[Any]) -> Any:
    return sides.bind(operands, slice_sizes=sides.shape)


RULES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "expand_dims": _reshape,
    "iota": _iota,
    "slice": _slice,
    "split": _split,
    "conv_general_dilated": _conv,
    "gather": _gather,
    **{name: _scatter for name in PRIMITIVES if name.startswith("scatter")},
    "argmax": _argmax,
    "top_k": _top_k,
    "dynamic_slice": _dynamic_slice,
}
