"""Groups and frozen axes as a table, with what each holds of the parameters and FLOPs."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._constraints import Solution
from jaxprune.graph._groups import Group, Member

_HIDDEN = ("it has one entry", "a window moves along it")
_MEMBERS = 6


def shares(
    own: Sequence[AxisInfo], solution: Solution, group: Group, flops: Sequence[float]
) -> tuple[float, float]:
    """The share of all parameters, and of the FLOPs of products with them, that goes with a group."""
    mine = np.zeros(len(solution.reason), bool)
    mine[group.units] = True
    gone = solution.removed(mine)
    entries = work = total = 0.0
    for axes, cost in zip(own, flops, strict=True):
        part = 1 - float(np.prod([1 - np.mean(gone[ids]) for ids in axes.ids]))
        size = float(np.prod(axes.shape))
        total, entries, work = total + size, entries + part * size, work + part * cost
    return entries / max(total, 1), work / max(sum(flops), 1)


def table_of(
    groups: Sequence[Group],
    own: Sequence[AxisInfo],
    solution: Solution,
    flops: Sequence[float] | None,
    frozen: Sequence[tuple[Member, str]],
    *,
    every: bool,
) -> Table:
    """One row per group, then one per frozen axis; without `every`, none of one entry or of space."""
    shown = [x for x in frozen if every or not x[1].rpartition(": ")[2].startswith(_HIDDEN)]
    hidden = len(frozen) - len(shown)
    caption = (
        f"{hidden} axes of one entry or of windows are hidden (every=True)" if hidden else None
    )
    table = Table(title="Coupling graph", caption=caption)
    for column in ("group", "kind", "units", "parameters", "FLOPs"):
        table.add_column(column, overflow="fold")
    table.add_column("axes that shrink together, or why one cannot", overflow="fold")
    for group in groups:
        n_params, n_flops = shares(own, solution, group, flops or [0.0] * len(own))
        few = group.members if every else group.members[:_MEMBERS]
        members = ", ".join(f"{path}[{axis}]" for path, axis in few)
        if len(few) < len(group.members):
            members += f" and {len(group.members) - len(few)} more"
        work = "" if flops is None else f"{n_flops:.1%}"
        table.add_row(group.label, group.kind, str(group.size), f"{n_params:.1%}", work, members)
    for (path, axis), reason in shown:
        table.add_row(f"{path}[{axis}]", "frozen", "", "", "", reason)
    return table
