"""Running a program at smaller sizes: each operation on what is left of its operands.

Most primitives take their sizes from their operands and run as they are. Those whose parameters name
sizes have a rule here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph._axes import Axes
from jaxprune.graph._nested import Inner, inside
from jaxprune.graph._vanish import Work, all_work
from jaxprune.program import RUN, Operation, Program, run_operation

Kept = tuple[np.ndarray, ...]  # per axis the indices that are left


class Plan(NamedTuple):
    """A program and what is left of its values.

    Attributes:
      program: the full-size program.
      work: which of its operations run.
      kept: per value and axis the indices that are left.
      bodies: programs within operations, and what is left of their values, by place.
    """

    program: Program
    work: Work
    kept: list[Kept]
    bodies: dict[tuple[int, ...], tuple[Program, list[Kept]]]


def plan_of(
    program: Program,
    axes: tuple[Axes, ...],
    bodies: dict[tuple[int, ...], Inner],
    removed: np.ndarray,
    work: Work | None = None,
) -> Plan:
    """How to run a program without the removed ids."""
    kept = lambda values: [tuple(np.flatnonzero(~removed[i]) for i in x.ids) for x in values]
    inner = {place: (body.program, kept(body.axes)) for place, body in bodies.items()}
    return Plan(program, work or all_work(program), kept(axes), inner)


def evaluate(plan: Plan, inputs: list[Any]) -> list[Any]:
    """The program's outputs, from arguments of which the parameters have their small size."""
    return _evaluate(plan.program, plan.work, plan.kept, plan.bodies, (), inputs)


def _evaluate(
    program: Program,
    work: Work,
    kept: list[Kept],
    bodies: dict[tuple[int, ...], tuple[Program, list[Kept]]],
    around: tuple[int, ...],
    inputs: list[Any],
) -> list[Any]:
    values: dict[int, Any] = dict(zip(program.inputs, inputs, strict=True))

    def read(number: int) -> Any:
        number = work.same.get(number, number)
        if number in work.zero:
            return jnp.zeros(_sizes(kept[number]), program.avals[number].dtype)
        if number not in values:
            values[number] = _cut(program.constants[number], kept[number])
        return values[number]

    for operation in work.operations:
        operands = [read(i) for i in operation.ins]
        place = (*around, *operation.outs[:1])
        run = RUN.get(operation.primitive.name)
        if run is not None and inside(place, 0) in bodies:
            outs = run(operation.params, _turns(bodies, place), operands)
        elif inside(place, 0) in bodies:
            outs = _at_full_size(program, operation, kept, operands)
        else:
            outs = _apply(program, operation, kept, operands)
        values.update(zip(operation.outs, outs, strict=True))
    return [read(i) for i in program.outputs]


def _turns(
    bodies: dict[tuple[int, ...], tuple[Program, list[Kept]]], place: tuple[int, ...]
) -> list[Callable[..., list[Any]]]:
    """The inner programs of an operation as functions."""
    found: list[Callable[..., list[Any]]] = []
    while (at := inside(place, len(found))) in bodies:
        program, kept = bodies[at]
        found.append(
            lambda *xs, program=program, kept=kept, at=at: _evaluate(
                program, all_work(program), kept, bodies, at, list(xs)
            )
        )
    return found


def _at_full_size(
    program: Program, operation: Operation, kept: list[Kept], operands: list[Any]
) -> list[Any]:
    """Operands spread to their full size, zeros between, and the results cut."""
    full = [
        _spread(x, kept[i], program.avals[i]) for x, i in zip(operands, operation.ins, strict=True)
    ]
    outs = run_operation(operation, full)
    return [_cut(x, kept[i]) for x, i in zip(outs, operation.outs, strict=True)]


def _spread(x: Any, kept: Kept, aval: Any) -> Any:
    if np.shape(x) == aval.shape:
        return x
    return jnp.zeros(aval.shape, aval.dtype).at[np.ix_(*kept)].set(x)


def _cut(value: Any, kept: Kept) -> Any:
    for axis, index in enumerate(kept):
        if len(index) < np.shape(value)[axis]:
            value = jnp.take(value, index, axis=axis)
    return value


def _apply(
    program: Program, operation: Operation, kept: list[Kept], operands: list[Any]
) -> list[Any]:
    avals = [program.avals[i] for i in operation.outs]
    after = [kept[i] for i in operation.outs]
    if avals and all(0 in _sizes(k) for k in after) and not operation.effects:
        return [jnp.zeros(_sizes(k), a.dtype) for k, a in zip(after, avals, strict=True)]
    before = [kept[i] for i in operation.ins]
    shrunk = lambda numbers, keeps: any(
        _sizes(k) != tuple(program.avals[i].shape) for i, k in zip(numbers, keeps, strict=True)
    )
    less_in, less_out = shrunk(operation.ins, before), shrunk(operation.outs, after)
    rule = RULES.get(operation.primitive.name)
    if rule is not None and (less_in or less_out):
        result = rule(operation.params, before, after, operands, operation.primitive)
        return result if isinstance(result, list) else [result]
    outs = run_operation(operation, operands)
    # what is made from nothing, such as random bits, is made whole and cut
    return (
        [_cut(x, k) for x, k in zip(outs, after, strict=True)] if less_out and not less_in else outs
    )


def _sizes(kept: Kept) -> tuple[int, ...]:
    return tuple(len(index) for index in kept)


def _with(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**params, **changes}


def _broadcast(params: Any, before: Any, after: Any, operands: Any, primitive: Any) -> Any:
    return jax.lax.broadcast_in_dim(operands[0], _sizes(after[0]), params["broadcast_dimensions"])


def _reshape(params: Any, before: Any, after: Any, operands: Any, primitive: Any) -> Any:
    return jnp.reshape(operands[0], _sizes(after[0]))


def _iota(params: Any, before: Any, after: Any, operands: Any, primitive: Any) -> Any:
    index = jnp.asarray(after[0][params["dimension"]], params["dtype"])
    return jax.lax.broadcast_in_dim(index, _sizes(after[0]), (params["dimension"],))


def _slice(params: Any, before: Any, after: Any, operands: Any, primitive: Any) -> Any:
    strides = params["strides"] or (1,) * len(params["start_indices"])
    x = operands[0]
    for axis, (start, limit, stride) in enumerate(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ):
        index = before[0][axis]
        inside = np.flatnonzero(
            (index >= start) & (index < limit) & ((index - start) % stride == 0)
        )
        if len(inside) < len(index):
            x = _along(x, inside, axis)
    return x


def _along(x: Any, index: np.ndarray, axis: int) -> Any:
    """The entries at some indices, by a slice where they are consecutive."""
    if len(index) and (np.diff(index) == 1).all():
        return jax.lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, axis=axis)
    return jnp.take(x, index, axis=axis)


def _split(params: Any, before: Any, after: Any, operands: Any, primitive: Any) -> Any:
    axis = params["axis"]
    return primitive.bind(operands[0], **_with(params, sizes=tuple(len(a[axis]) for a in after)))


def _conv(params: Any, before: Any, after: Any, operands: Any, primitive: Any) -> Any:
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    lhs, rhs = operands
    if 0 in np.shape(lhs) or 0 in np.shape(rhs):
        return jnp.zeros(_sizes(after[0]), params["preferred_element_type"] or lhs.dtype)
    if groups > 1:
        groups = lhs.shape[spec.lhs_spec[1]] // rhs.shape[spec.rhs_spec[1]]
    return primitive.bind(*operands, **_with(params, feature_group_count=groups))


def _gather(params: Any, before: Any, after: Any, operands: Any, primitive: Any) -> Any:
    sizes = tuple(
        len(index) if size == params["slice_sizes"][axis] and len(index) < size else size
        for axis, (index, size) in enumerate(zip(before[0], params["slice_sizes"], strict=True))
    )
    return primitive.bind(*operands, **_with(params, slice_sizes=sizes))


def _dynamic_slice(params: Any, before: Any, after: Any, operands: Any, primitive: Any) -> Any:
    return primitive.bind(*operands, **_with(params, slice_sizes=_sizes(after[0])))


RULES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "expand_dims": _reshape,
    "iota": _iota,
    "slice": _slice,
    "split": _split,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
