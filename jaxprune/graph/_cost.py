"""What a program costs, counted operation by operation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from jaxprune.graph._axes import Axes
from jaxprune.graph._elementwise import UNARY
from jaxprune.graph._nested import inside
from jaxprune.program import Operation, Program, split_scan

_FREE = frozenset(
    [
        "reshape",
        "transpose",
        "broadcast_in_dim",
        "squeeze",
        "expand_dims",
        "slice",
        "concatenate",
        "pad",
        "convert_element_type",
        "copy",
        "stop_gradient",
        "iota",
        "gather",
        "rev",
        "split",
        "select_n",
        "dynamic_slice",
        "optimization_barrier",
        "scatter",
        "stack",
        "unstack",
        "tile",
        "random_bits",
        "dynamic_update_slice",
        "name",
        "sharding_constraint",
    ]
)
_COSTLY = UNARY - _FREE - {"abs", "neg", "square", "integer_pow", "sign", "floor", "ceil", "not"}


@dataclass(frozen=True)
class OperationCost:
    """Cost of one operation.

    Attributes:
      name: primitive.
      flops: floating-point operations, 2 per multiply-add; transcendental functions are not counted.
      bytes_out: bytes of its results.
      source: where the program called it.
    """

    name: str
    flops: float
    bytes_out: int
    source: str


@dataclass(frozen=True)
class Cost:
    """Cost of a call.

    Attributes:
      operations: per operation.
      param_bytes: bytes of all parameters.
    """

    operations: tuple[OperationCost, ...]
    param_bytes: int

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return sum(operation.flops for operation in self.operations)

    @property
    def macs(self) -> float:
        """Multiply-adds of matrix products and convolutions."""
        names = ("dot_general", "conv_general_dilated")
        return sum(operation.flops for operation in self.operations if operation.name in names) / 2

    @property
    def activation_bytes(self) -> int:
        """Bytes of all intermediate results, each counted once."""
        return sum(operation.bytes_out for operation in self.operations)

    @property
    def table(self) -> Table:
        """The costliest operations, and the total."""
        table = Table(title="Cost of a call", show_footer=True)
        table.add_column("operation", footer="total")
        table.add_column("MFLOPs", footer=f"{self.flops / 1e6:.2f}", justify="right")
        table.add_column("kB out", footer=f"{self.activation_bytes / 1e3:.1f}", justify="right")
        table.add_column("at")
        for x in sorted(self.operations, key=lambda x: -x.flops)[:20]:
            table.add_row(x.name, f"{x.flops / 1e6:.2f}", f"{x.bytes_out / 1e3:.1f}", x.source)
        return table


def cost_of(
    program: Program,
    axes: tuple[Axes, ...],
    n_params: int,
    removed: np.ndarray | None,
    bodies: dict[tuple[int, ...], Any],
) -> Cost:
    """The cost of a program, at full size or without the removed ids."""
    operations = _costs(program, axes, removed, bodies, ())
    own = [_bytes(program, axes, removed, i) for i in program.inputs[:n_params]]
    return Cost(tuple(operations), sum(own))


def _shape(
    program: Program, axes: tuple[Axes, ...], removed: np.ndarray | None, number: int
) -> tuple[int, ...]:
    full = tuple(program.avals[number].shape)
    if removed is None:
        return full
    return tuple(n - int(removed[ids].sum()) for n, ids in zip(full, axes[number].ids, strict=True))


def _bytes(
    program: Program, axes: tuple[Axes, ...], removed: np.ndarray | None, number: int
) -> int:
    dtype = program.avals[number].dtype
    return _product(_shape(program, axes, removed, number)) * dtype.itemsize


def _costs(
    program: Program,
    axes: tuple[Axes, ...],
    removed: np.ndarray | None,
    bodies: dict[tuple[int, ...], Any],
    around: tuple[int, ...],
) -> list[OperationCost]:
    """Per operation; those in the body of a scan count once per turn."""
    found = []
    for op in program.operations:
        place = (*around, *op.outs[:1])
        if inside(place, 0) in bodies:
            found += _nested_costs(program, axes, op, removed, bodies, place)
            continue
        ins, outs = (
            [_shape(program, axes, removed, i) for i in group] for group in (op.ins, op.outs)
        )
        size = sum(_bytes(program, axes, removed, i) for i in op.outs)
        found.append(OperationCost(op.primitive.name, _flops(op, ins, outs), size, op.source))
    return found


def _nested_costs(
    program: Program,
    axes: tuple[Axes, ...],
    op: Operation,
    removed: np.ndarray | None,
    bodies: dict[tuple[int, ...], Any],
    place: tuple[int, ...],
) -> list[OperationCost]:
    """Inner programs: every turn of a scan, one of a while loop, the costliest of branches."""
    name, turns = op.primitive.name, 1
    inners, which = [], 0
    while (at := inside(place, which)) in bodies:
        inner = bodies[at]
        inners.append(_costs(inner.program, inner.axes, removed, bodies, at))
        which += 1
    if name == "scan":
        scanned = op.ins[sum(split_scan(op.params)) :]
        turns = _shape(program, axes, removed, scanned[0])[0] if scanned else op.params["length"]
    if name == "cond":
        inners = [max(inners, key=lambda costs: sum(cost.flops for cost in costs))]
    return [
        OperationCost(cost.name, turns * cost.flops, turns * cost.bytes_out, cost.source)
        for costs in inners
        for cost in costs
    ]


def _flops(op: Operation, ins: list[tuple[int, ...]], outs: list[tuple[int, ...]]) -> float:
    name = op.primitive.name
    if name == "dot_general":
        (contracted, _), _ = op.params["dimension_numbers"]
        return 2.0 * _product(outs[0]) * _product([ins[0][i] for i in contracted])
    if name == "conv_general_dilated":
        return _convolution(op.params, ins, outs[0])
    if name in _FREE or name in _COSTLY:
        return 0.0
    if name.startswith(("reduce_", "arg", "cum")) and "window" not in name:
        return float(_product(ins[0]))
    if name.startswith("reduce_window"):
        return float(_product(outs[0]) * _product(op.params["window_dimensions"]))
    return float(_product(outs[0])) if outs else 0.0


def _product(sizes: Any) -> int:
    return int(np.prod(sizes, dtype=np.int64))


def _convolution(params: dict[str, Any], ins: list[tuple[int, ...]], out: tuple[int, ...]) -> float:
    """Two per multiply-add; taps that fall into padding or between dilated inputs are not counted."""
    spec = params["dimension_numbers"]
    lhs, rhs = ins[:2]
    taps = 1
    for k, (l, r, o) in enumerate(
        zip(spec.lhs_spec[2:], spec.rhs_spec[2:], spec.out_spec[2:], strict=True)
    ):
        position = (
            np.arange(out[o])[:, None] * params["window_strides"][k]
            + np.arange(rhs[r])[None] * params["rhs_dilation"][k]
            - params["padding"][k][0]
        )
        dilation = params["lhs_dilation"][k]
        inside = (
            (position >= 0) & (position <= (lhs[l] - 1) * dilation) & (position % dilation == 0)
        )
        taps *= int(inside.sum())
    batch, features = out[spec.out_spec[0]], out[spec.out_spec[1]]
    return 2.0 * taps * batch * features * rhs[spec.rhs_spec[1]]
