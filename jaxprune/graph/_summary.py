"""How much of a function can be removed, and what keeps the rest."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._constraints import Solution

_PLACE = re.compile(r" at \S+:\d+ \([^)]*\)")
_PORTION = re.compile(r"^\d+ of its \d+ indices: ")

_CURES = {
    "tied to axis": "the size of an input; name caches and recurrent states: trace(..., states=...)",
    "reaches output": "the size of an output; name updated parameters (updates=) and states (states=)",
    "looked up": "rows of a table are chosen by data; its columns may go",
    "written": "entries are chosen by data; what is written whole may go",
    "no rule": "this operation is not known; write it with others, or add a rule to graph/_couple.py",
    "rows are divided": "experts are chosen by data: they may go from structure.route_around(fn, …)",
    "a window moves": "space, not channels",
    "it has one entry": "nothing to choose from",
    "not read": "the function never reads it; leave it out of the parameters",
    "scanned over": "layers of a scan go where a masked one hands on its input: a residual branch",
    "a state that grows": "it has another size at every call",
}
_MIXED = (
    "units are mixed, and what is masked is seen: sums count it; maxima, sorts and the like cannot"
)


class Reason(NamedTuple):
    """What keeps axes from shrinking.

    Attributes:
      text: the reason, without places.
      parameters: share of all parameters that lie in leaves with such an axis.
      axes: how many there are.
      example: one of them, and the place in the program.
      cure: what to do about it, if anything.
    """

    text: str
    parameters: float
    axes: int
    example: str
    cure: str


@dataclass(frozen=True, repr=False)
class Summary:
    """How much of a function can be removed; from `graph.summary()`.

    Attributes:
      parameters: share of the parameters that lie in units that can go.
      flops: share of the FLOPs that those units cost together; `None` where sizes are symbolic.
      groups: how many groups of units there are.
      reasons: what keeps axes from shrinking, what touches most parameters first.
    """

    parameters: float
    flops: float | None
    groups: int
    reasons: tuple[Reason, ...]

    @property
    def table(self) -> Table:
        """The five reasons that touch most, as a `rich` table."""
        flops = "" if self.flops is None else f" and {self.flops:.1%} of the FLOPs"
        title = f"{self.parameters:.1%} of the parameters{flops} can go, in {self.groups} groups"
        table = Table(title=title)
        for column in ("why axes stay", "parameters", "axes", "for example", "cure"):
            table.add_column(column, overflow="fold")
        for reason in self.reasons[:5]:
            row = reason.text, f"{reason.parameters:.1%}", str(reason.axes), reason.example
            table.add_row(*row, reason.cure)
        return table

    def __rich__(self) -> Table:
        return self.table

    def __repr__(self) -> str:
        flops = "" if self.flops is None else f", {self.flops:.1%} of the FLOPs"
        return (
            f"Summary({self.parameters:.1%} of the parameters{flops} in {self.groups} groups, "
            f"{len(self.reasons)} reasons)"
        )

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as text:
            console.print(self.table)
        return text.get()


def share_of_parameters(own: Sequence[AxisInfo], solution: Solution) -> float:
    """The share of entries that lie in a unit that can go, along any axis."""
    free = total = 0.0
    for axes in own:
        size = float(np.prod(axes.shape))
        stuck = [float(np.mean(solution.reason[solution.label[ids]] >= 0)) for ids in axes.ids]
        total += size
        free += size * (1 - float(np.prod(stuck))) if stuck else 0.0
    return free / total if total else 0.0


def reasons_of(
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    frozen: Sequence[tuple[tuple[str, int], str]],
) -> tuple[Reason, ...]:
    """Reasons of frozen axes, alike ones together.

    Args:
      paths: of the parameters.
      shapes: of each.
      frozen: `((path, axis), reason)`.
    """
    sizes = {path: int(np.prod(shape)) for path, shape in zip(paths, shapes, strict=True)}
    total = max(sum(sizes.values()), 1)
    places: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for (path, axis), text in frozen:
        text = _PORTION.sub("", text)
        places[_PLACE.sub("", text)].append((path, axis, text))
    found = []
    for text, members in places.items():
        path, axis, full = members[0]
        place = _PLACE.search(full)
        found.append(
            Reason(
                text,
                sum(sizes[name] for name in {name for name, _, _ in members}) / total,
                len(members),
                f"{path}[{axis}]{place.group() if place else ''}",
                next((cure for start, cure in _CURES.items() if text.startswith(start)), _MIXED),
            )
        )
    return tuple(sorted(found, key=lambda reason: -reason.parameters))
