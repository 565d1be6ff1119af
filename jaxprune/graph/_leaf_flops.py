"""What products with each parameter cost."""

from collections.abc import Sequence

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._cost import operation_flops
from jaxprune.program import Flow, Operation, Program, is_product, split_scan


def leaf_flops(program: Program, axes: Sequence[AxisInfo], n_leaves: int) -> tuple[float, ...]:
    """FLOPs of all matrix products and convolutions with each leaf, views of it included.

    Bodies of scans count once per iteration, of while loops once, and branches all.
    """
    flow = Flow(program, n_leaves)
    found = [0.0] * n_leaves

    def visit(program: Program, times: float) -> None:
        for op in program.operations:
            for inner in op.inner:
                visit(inner, times * _iterations(op, axes))
            if not is_product(op.name) or op.inner:
                continue
            cost = times * operation_flops(op, axes)
            for leaf in {flow.leaf(number) for number in op.ins[:2]}:
                if leaf is not None:
                    found[leaf] += cost

    visit(program, 1.0)
    return tuple(found)


def _iterations(op: Operation, axes: Sequence[AxisInfo]) -> float:
    if op.name != "scan":
        return 1.0
    scanned = op.ins[sum(split_scan(op.params)) :]
    return float(axes[scanned[0]].shape[0] if scanned else op.params["length"])
