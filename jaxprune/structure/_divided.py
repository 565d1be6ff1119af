"""How many units go of groups that divide an axis, such as heads and their dimensions in one matrix."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxprune.graph import Graph, Group

_MOST = 200_000  # combinations that are tried
_NEAR = 0.005  # of an axis: counts so near to the best are as good


def divided_axes(graph: Graph, groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """Numbers of the groups that divide an axis of a parameter between them, the most groups first."""
    owner = np.full(len(graph.solution.reason), -1)
    for i, group in enumerate(groups):
        owner[group.units] = i
    found = set[tuple[int, ...]]()
    for axes in graph.own:
        for ids in axes.ids:
            labels = np.unique(graph.solution.label[ids])
            labels = labels[graph.solution.row[labels] >= 0]
            if not len(labels):
                continue
            position, units = graph.solution.factors(labels)
            pairs = np.unique(np.stack([position, owner[units]]), axis=1)
            pairs = pairs[:, pairs[1] >= 0]
            for part in np.split(pairs[1], np.flatnonzero(np.diff(pairs[0])) + 1):
                if len(part) > 1:
                    found.add(tuple(sorted(part.tolist())))
    return sorted(found, key=lambda part: (-len(part), part))


def not_compounded(
    graph: Graph,
    groups: Sequence[Group],
    ranked: Sequence[Float[np.ndarray, "units"]],
    asked: Float[np.ndarray, "groups"],
    least: Sequence[int],
) -> Int[np.ndarray, "groups"]:
    """How many units of each group go, so that an axis loses what was asked for and not more.

    An index of an axis that groups divide stays when its unit of each of them does: removing 40 % of both
    leaves 36 % of it. Such an axis loses the share that is asked of all units of its groups: by the
    counts that come next to it, and among those lose least of the scores.

    Args:
      graph: of the groups.
      groups: groups of units.
      ranked: scores of their units.
      asked: how many units of each should go, not rounded.
      least: how many of each stay at least.
    """
    found, settled = np.round(asked).astype(int), set[int]()
    for part in divided_axes(graph, groups):
        own = [i for i in part if i not in settled]
        settled.update(part)
        if not own:
            continue
        sizes = np.array([groups[i].size for i in part], float)
        whole = float(np.prod(sizes))
        target = whole * (1 - float(asked[list(part)].sum() / sizes.sum()))
        fixed = float(np.prod([groups[i].size - found[i] for i in part if i not in own]))
        curves = [_lost(ranked[i], least[i]) for i in own]
        found[own] = _best([groups[i].size for i in own], curves, target, fixed, whole)
    return found


def _lost(scores: Float[np.ndarray, "units"], least: int) -> Float[np.ndarray, "counts"]:
    """The share of the scores that goes with each number of units, as far as they may go."""
    order = np.sort(np.where(np.isneginf(scores), 0, scores))
    known = order[np.isfinite(order)]
    most = max(min(len(known), len(scores) - least), 0)
    share = np.append(0, np.cumsum(known)) / max(float(np.sum(np.abs(known))), 1e-30)
    return share[: most + 1]


def _best(
    sizes: Sequence[int],
    curves: Sequence[Float[np.ndarray, "counts"]],
    target: float,
    fixed: float,
    whole: float,
) -> list[int]:
    """How many units go of each group of one axis."""
    counts = [np.arange(len(curve)) for curve in curves]
    while np.prod([len(count) for count in counts], dtype=float) > _MOST:
        counts = [count[np.unique(np.append(np.arange(0, len(count), 2), len(count) - 1))]
                  for count in counts]  # fmt: skip
    left, cost = np.full([len(count) for count in counts], fixed), 0.0
    for axis, (size, count, curve) in enumerate(zip(sizes, counts, curves, strict=True)):
        shape = [-1 if k == axis else 1 for k in range(len(counts))]
        left = left * (size - count).reshape(shape)
        cost = cost + curve[count].reshape(shape)
    distance = np.abs(left - target)
    near = distance <= distance.min() + _NEAR * whole
    best = np.unravel_index(np.where(near, cost, np.inf).argmin(), left.shape)
    return [int(count[k]) for count, k in zip(counts, best, strict=True)]
