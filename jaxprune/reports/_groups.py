"""A picture of a coupling graph: which layers share channels."""

from pathlib import Path
from typing import Any

from jaxprune._types import Masks
from jaxprune.graph import Graph, GroupWhere, Only, chosen_groups
from jaxprune.reports._plot import new_figure

_COLOURS = 10
_INCHES_PER_ROW, _INCHES_PER_COLUMN = 0.19, 0.3
_MOST_INCHES = 60


def plot_groups(
    path: str | Path,
    graph: Graph,
    *,
    masks: Masks | None = None,
    only: Only = None,
    where: GroupWhere = None,
) -> Path:
    """Draws which modules share units: one column per group, one row per module.

    A filled dot: the module makes the units (they are the last axis of a kernel, a bias, a scale); a
    ring: it consumes them (any other axis). Above each column its number of units, and with `masks` how
    many are left. Rows without a dot cannot shrink.

    Args:
      path: the file; its suffix chooses the format.
      graph: from `jp.trace`.
      masks: masks of the traced parameters.
      only, where: the groups to draw, see `jp.structure.unit_masks`; all by default.

    Returns:
      The path.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: kinds and patterns that fit no group.

    Example:
      >>> import tempfile
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 4)))
      >>> jp.reports.plot_groups(tempfile.mkdtemp() + "/groups.svg", graph).name
      'groups.svg'
    """
    rows = list(dict.fromkeys(_module(p) for p in graph.paths))
    row = {name: i for i, name in enumerate(rows)}
    rank = dict(zip(graph.paths, map(len, graph.shapes), strict=True))
    groups = chosen_groups(graph.groups, only=only, where=where)
    columns = max(len(groups), 1)
    longest = max((len(name) for name in rows), default=1)
    width = min(max(4.0, columns * _INCHES_PER_COLUMN + 1.0) + longest * 0.075, _MOST_INCHES)
    height = min(2.0 + len(rows) * _INCHES_PER_ROW, _MOST_INCHES)
    figure = new_figure(width, height)
    ratios = (1.2, max(len(rows) * _INCHES_PER_ROW, 0.5))
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    for i in range(0, len(rows), 2):
        main.axhspan(i - 0.5, i + 0.5, color="0.96", zorder=0)
    gone = None if masks is None else graph.removal(masks).units
    for column, group in enumerate(groups):
        colour = f"C{column % _COLOURS}"
        made, used = set(), set()
        for member, axis in group.members:
            side = made if axis == rank[member] - 1 else used
            side.add(row[_module(member)])
        touched = sorted(made | used)
        main.plot([column] * 2, [touched[0], touched[-1]], color=colour, lw=1.2, zorder=1)
        main.plot(
            [column] * len(used), sorted(used), "o", mfc="white", color=colour, ms=6, zorder=2
        )
        main.plot([column] * len(made), sorted(made), "o", color=colour, ms=4, zorder=3)
        left = group.size if gone is None else int((~gone[group.units]).sum())
        top.bar(column, group.size, color=colour, alpha=0.25 if gone is not None else 1)
        if gone is not None:
            top.bar(column, left, color=colour)
        label = f"{group.size}" if gone is None else f"{left}/{group.size}"
        top.annotate(
            label,
            (column, group.size),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            rotation=90 if len(label) > 3 else 0,
        )
    _dress(top, main, rows, columns, has_masks=gone is not None)
    path = Path(path)
    figure.savefig(path)
    return path


def _module(path: str) -> str:
    return path.rpartition("/")[0] or path


def _dress(top: Any, main: Any, rows: list[str], columns: int, *, has_masks: bool) -> None:
    """Axes, labels and the key."""
    main.set_yticks(range(len(rows)), rows, fontsize=8)
    main.set_ylim(len(rows) - 0.5, -0.5)
    main.set_xlim(-0.6, columns - 0.4)
    main.set_xticks(range(columns), [str(i + 1) for i in range(columns)], fontsize=7)
    main.set_xlabel("group")
    main.set_ylabel("modules")
    top.set_ylabel("units left" if has_masks else "units")
    top.margins(y=0.35)
    top.spines[["top", "right"]].set_visible(False)
    main.plot([], [], "o", color="0.3", ms=4, label="makes the units")
    main.plot([], [], "o", color="0.3", mfc="white", ms=6, label="consumes them")
    main.legend(loc="upper right", fontsize=7, framealpha=0.9)
    main.tick_params(axis="y", length=0)
