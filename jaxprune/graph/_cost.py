"""What a program costs, counted operation by operation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._nested import nested_rule
from jaxprune.program import Kind, Operation, Program, is_product, primitive, split_scan


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


@dataclass(frozen=True, repr=False)
class Cost:
    """Cost of a call.

    Attributes:
      operations: per operation.
      param_bytes: bytes of all parameters.
    """

    operations: tuple[OperationCost, ...]
    param_bytes: int

    def __repr__(self) -> str:
        return (
            f"Cost({self.flops:,.0f} FLOPs, {self.param_bytes:,} bytes of parameters, "
            f"{self.activation_bytes:,} of activations, {len(self.operations)} operations)"
        )

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return sum(operation.flops for operation in self.operations)

    @property
    def macs(self) -> float:
        """Multiply-adds of matrix products and convolutions."""
        return sum(x.flops for x in self.operations if is_product(x.name)) / 2

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
    program: Program, axes: tuple[AxisInfo, ...], n_params: int, removed: np.ndarray | None
) -> Cost:
    """The cost of a program, at full size or without the removed ids."""
    operations = _costs(program, axes, removed)
    own = [_bytes(program, axes, removed, i) for i in program.inputs[:n_params]]
    return Cost(tuple(operations), sum(own))


def _shape(axes: tuple[AxisInfo, ...], removed: np.ndarray | None, number: int) -> tuple[int, ...]:
    if removed is None:
        return axes[number].shape
    return tuple(len(ids) - int(removed[ids].sum()) for ids in axes[number].ids)


def _bytes(
    program: Program, axes: tuple[AxisInfo, ...], removed: np.ndarray | None, number: int
) -> int:
    return _product(_shape(axes, removed, number)) * program.avals[number].dtype.itemsize


def _costs(
    program: Program, axes: tuple[AxisInfo, ...], removed: np.ndarray | None
) -> list[OperationCost]:
    """Per operation; those in the body of a scan count once per iteration."""
    found = []
    for op in program.operations:
        if nested_rule(op) is not None:
            found += _nested_costs(axes, op, removed)
            continue
        ins, outs = ([_shape(axes, removed, i) for i in group] for group in (op.ins, op.outs))
        size = sum(_bytes(program, axes, removed, i) for i in op.outs)
        found.append(OperationCost(op.name, _flops(op, ins, outs), size, op.source))
    return found


def operation_flops(op: Operation, axes: Sequence[AxisInfo]) -> float:
    """FLOPs of one operation that holds no program, at full size."""
    ins, outs = ([_shape(tuple(axes), None, i) for i in group] for group in (op.ins, op.outs))
    return _flops(op, ins, outs)


def _nested_costs(
    axes: tuple[AxisInfo, ...], op: Operation, removed: np.ndarray | None
) -> list[OperationCost]:
    """Inner programs: every iteration of a scan, one of a while loop, the costliest of branches."""
    inners = [_costs(inner, axes, removed) for inner in op.inner]
    steps = 1
    if op.name == "scan":
        scanned = op.ins[sum(split_scan(op.params)) :]
        steps = _shape(axes, removed, scanned[0])[0] if scanned else op.params["length"]
    if op.name == "cond":
        inners = [max(inners, key=lambda costs: sum(cost.flops for cost in costs))]
    return [
        OperationCost(cost.name, steps * cost.flops, steps * cost.bytes_out, cost.source)
        for costs in inners
        for cost in costs
    ]


def _flops(op: Operation, ins: list[tuple[int, ...]], outs: list[tuple[int, ...]]) -> float:
    known, params = primitive(op.name), op.params
    if known.kind is Kind.PRODUCT:
        if op.name == "conv_general_dilated":
            return _convolution(params, ins, outs[0])
        return _matrix_product(params, ins)
    if known.is_free or known.is_transcendental:
        return 0.0
    if known.kind in (Kind.REDUCTION, Kind.CUMULATIVE):
        return float(_product(ins[0]))
    if known.kind is Kind.WINDOW and "window_dimensions" in params:
        return float(_product(outs[0]) * _product(params["window_dimensions"]))
    return float(_product(outs[0])) if outs else 0.0


def _matrix_product(params: dict[str, Any], ins: list[tuple[int, ...]]) -> float:
    """Two per multiply-add: each entry of the left operand meets the free axes of the right one.

    In a ragged product it meets one matrix of the right operand, not every one.
    """
    ragged = params.get("ragged_dot_dimension_numbers")
    numbers = ragged.dot_dimension_numbers if ragged else params["dimension_numbers"]
    (_, contracted), (_, batch) = numbers
    used = {*contracted, *batch, *(ragged.rhs_group_dimensions if ragged else ())}
    return 2.0 * _product(ins[0]) * _product([n for i, n in enumerate(ins[1]) if i not in used])


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
