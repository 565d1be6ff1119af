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
from jaxprune.graph._loops import Body, run_scan
from jaxprune.graph._program import Operation, Program

Kept = tuple[np.ndarray, ...]  # per axis the indices that are left


class Plan(NamedTuple):
    """A program and what is left of its values.

    Attributes:
      program: the full-size program.
      kept: per value and axis the indices that are left.
      bodies: bodies of loops and what is left of their values, by place.
    """

    program: Program
    kept: list[Kept]
    bodies: dict[tuple[int, ...], tuple[Body, list[Kept]]]


def plan_of(
    program: Program,
    axes: tuple[Axes, ...],
    bodies: dict[tuple[int, ...], tuple[Body, tuple[Axes, ...]]],
    removed: np.ndarray,
) -> Plan:
    """How to run a program without the removed ids."""
    kept = lambda values: [tuple(np.flatnonzero(~removed[i]) for i in x.ids) for x in values]
    inner = {place: (body, kept(values)) for place, (body, values) in bodies.items()}
    return Plan(program, kept(axes), inner)


def evaluate(plan: Plan, inputs: list[Any]) -> list[Any]:
    """The program's outputs, from arguments of which the parameters have their small size."""
    return _evaluate(plan.program, plan.kept, plan.bodies, (), inputs)


def _evaluate(
    program: Program,
    kept: list[Kept],
    bodies: dict[tuple[int, ...], tuple[Body, list[Kept]]],
    around: tuple[int, ...],
    inputs: list[Any],
) -> list[Any]:
    values: dict[int, Any] = dict(zip(program.inputs, inputs, strict=True))
    for number, value in program.constants.items():
        values[number] = _cut(value, kept[number])
    for operation in program.operations:
        operands = [values[i] for i in operation.ins]
        place = (*around, *operation.outs[:1])
        if operation.primitive.name == "scan" and place in bodies:
            body, inner = bodies[place]
            turn = lambda *xs, body=body, inner=inner, place=place: _evaluate(
                body.program, inner, bodies, place, list(xs)
            )
            outs = run_scan(operation.params, body, turn, operands)
        else:
            outs = _apply(program, operation, kept, operands)
        values.update(zip(operation.outs, outs, strict=True))
    return [values[i] for i in program.outputs]


def _cut(value: Any, kept: Kept) -> Any:
    for axis, index in enumerate(kept):
        if len(index) < np.shape(value)[axis]:
            value = jnp.take(value, index, axis=axis)
    return value


def _apply(
    program: Program, operation: Operation, kept: list[Kept], operands: list[Any]
) -> list[Any]:
    params = operation.params
    if operation.is_relu:
        return [jax.nn.relu(operands[0])]
    rule = RULES.get(operation.primitive.name)
    if rule is not None:
        before = [kept[i] for i in operation.ins]
        after = [kept[i] for i in operation.outs]
        if any(
            len(index) < n
            for number in (*operation.ins, *operation.outs)
            for index, n in zip(kept[number], program.avals[number].shape, strict=True)
        ):
            result = rule(params, before, after, operands, operation.primitive)
            return result if isinstance(result, list) else [result]
    bound = operation.primitive.get_bind_params(params)  # some JAX versions return functions apart
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    result = operation.primitive.bind(*functions, *operands, **params)
    return list(result) if operation.primitive.multiple_results else [result]


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
    groups = params["feature_group_count"]
    if groups > 1:
        groups = len(before[0][params["dimension_numbers"].lhs_spec[1]])
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
