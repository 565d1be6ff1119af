"""k-means on a line: near-exact, without looking at all points in every turn.

Points are gathered into bins along the order of floats (the upper 16 bits of a float32: 128 bins per
octave), with counts, sums and sums of squares. On a few hundred of those, the best start is found by
dynamic programming; Lloyd's iteration then moves boundaries over sums of bins until nothing changes;
last, points of the bins that a boundary cuts are compared one by one.
"""

from typing import Any, NamedTuple

import numpy as np

_BINS = 1 << 16
_CANDIDATES = 512  # boundaries that dynamic programming chooses from
_FEW = 128  # and for few points
_EXACT_START = 64  # clusters; more start from the density
_TURNS = 300
STARTS = ("optimal", "linear", "density", "kmeans++")


class Line(NamedTuple):
    """Points on a line, gathered into bins in ascending order.

    Attributes:
      place: the bin of each point, uint16.
      used: numbers of the bins that hold points.
      weight, first, second: sums of weights, weight times value and times its square before each used
        bin, and in all.
      means: mean of each used bin.
    """

    place: np.ndarray
    used: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    second: np.ndarray
    means: np.ndarray


def order_of(x: np.ndarray) -> np.ndarray:
    """Bins of floats, ascending with their values."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    upper = (bits >> 16).astype(np.uint16)
    negative = (upper >> 15).astype(bool)
    return np.where(negative, ~upper, upper | np.uint16(0x8000))


def line_of(x: np.ndarray, weight: np.ndarray | None) -> Line:
    """Points gathered into bins."""
    x = x + np.float32(0)  # no negative zeros
    place = order_of(x)
    counts = np.bincount(place, minlength=_BINS)
    used = np.flatnonzero(counts)
    if weight is None:
        totals, wide = counts.astype(np.float64), x
        sums = np.bincount(place, x, _BINS)
    else:
        wide = weight.astype(np.float64)
        totals = np.bincount(place, wide, _BINS)
        plain = np.bincount(place, x, _BINS) / np.maximum(counts, 1)
        # points of weight 0 count a little, so that each has a cluster
        least = max(totals.max(initial=0.0), 1e-300) * 1e-12
        sums = np.bincount(place, wide * x, _BINS) + least * plain
        totals = totals + least * (counts > 0)
    means = sums[used] / totals[used]
    zero = np.zeros(1)
    ahead = lambda y: np.concatenate([zero, np.cumsum(y)])
    return Line(
        place,
        used,
        ahead(totals[used]),
        ahead(sums[used]),
        ahead(sums[used] * means),
        means,
    )


def kmeans(
    x: np.ndarray,
    clusters: int,
    *,
    weight: np.ndarray | None = None,
    start: str = "optimal",
    turns: int = _TURNS,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids, ascending, and the nearest of each point.

    Args:
      x: (n,) finite float32.
      clusters: how many, 1 to 256; with fewer distinct values the last are repeated.
      weight: (n,) non-negative, or `None`.
      start: `"optimal"` (dynamic programming), `"linear"` (evenly over the range), `"density"`
        (quantiles) or `"kmeans++"`.
      turns: of Lloyd's iteration at most.
      seed: of kmeans++.

    Returns:
      float32 (clusters,) and uint8 (n,).
    """
    line = line_of(x, weight)
    cuts = _start(line, clusters, start, seed)
    for _ in range(turns):
        centers = _centers(line, cuts)
        fresh = np.searchsorted(line.means, (centers[1:] + centers[:-1]) / 2)
        if np.array_equal(fresh, cuts[1:-1]):
            break
        cuts = np.concatenate([[0], fresh, [len(line.used)]])
    centers = _centers(line, cuts).astype(np.float32)
    return centers, nearest(x, centers, line)


def _centers(line: Line, cuts: np.ndarray) -> np.ndarray:
    """Means between cuts, ascending; an empty cluster repeats its neighbour's."""
    total = np.diff(line.weight[cuts])
    sums = np.diff(line.first[cuts])
    means = np.where(total > 0, sums / np.where(total > 0, total, 1), np.nan)
    if np.isnan(
        means
    ).any():  # an empty cluster takes over the bin that lies farthest from its mean
        means = _filled(line, cuts, means)
    return means


def _filled(line: Line, cuts: np.ndarray, means: np.ndarray) -> np.ndarray:
    known = means[~np.isnan(means)]
    owner = np.clip(np.searchsorted((known[1:] + known[:-1]) / 2, line.means), 0, len(known) - 1)
    far = np.diff(line.weight) * np.square(line.means - known[owner])
    spare = line.means[np.argsort(-far, kind="stable")]
    spare = spare[~np.isin(spare, known)][: len(means) - len(known)]
    pad = np.full(len(means) - len(known) - len(spare), known[-1])
    return np.sort(np.concatenate([known, spare, pad]))


def nearest(x: np.ndarray, centers: np.ndarray, line: Line | None = None) -> np.ndarray:
    """The nearest of ascending centers for each point; of two as near, the lower."""
    middles = ((centers[1:].astype(np.float64) + centers[:-1]) / 2).astype(np.float32)
    place = order_of(x + np.float32(0)) if line is None else line.place
    cut = order_of(middles)
    table = np.searchsorted(cut, np.arange(_BINS)).astype(np.uint8)
    found = table[place]
    parted = np.zeros(_BINS, bool)
    parted[cut] = True
    unsure = np.flatnonzero(parted[place])
    if len(unsure):
        found[unsure] = np.searchsorted(middles, x[unsure])
    return found


def _start(line: Line, clusters: int, start: str, seed: int) -> np.ndarray:
    n = len(line.used)
    if start == "optimal" and clusters <= _EXACT_START:
        return _optimal(line, clusters)
    if start == "linear":
        centers = np.linspace(line.means[0], line.means[-1], clusters)
    elif start == "kmeans++":
        centers = _plus_plus(line, clusters, np.random.default_rng(seed))
    else:
        # of equal mass; the optimal density of centroids is that of points to the power 1/3
        mass = np.diff(line.weight)
        if start == "optimal":
            edges = np.concatenate([[line.means[0]], line.means])
            width = np.maximum(np.diff(edges), 1e-30)
            mass = np.cbrt(mass * width * width)
        total = np.concatenate([[0.0], np.cumsum(mass)])
        cuts = np.searchsorted(total, total[-1] * np.arange(1, clusters) / clusters)
        return np.concatenate([[0], np.clip(cuts, 0, n), [n]])
    middles = (centers[1:] + centers[:-1]) / 2
    return np.concatenate([[0], np.searchsorted(line.means, middles), [n]])


def _optimal(line: Line, clusters: int) -> np.ndarray:
    """Cuts of least inertia among candidates that lie where the best clusters are small."""
    n = len(line.used)
    if n <= clusters:
        return np.minimum(np.arange(clusters + 1), n)
    most = _FEW if line.place.size < _BINS else _CANDIDATES
    if n <= most:
        edges = np.arange(n + 1)
    else:
        gaps = np.maximum(np.diff(line.means, prepend=line.means[0]), 1e-30)
        mass = np.cbrt(np.diff(line.weight) * gaps * gaps)
        total = np.concatenate([[0.0], np.cumsum(mass)])
        edges = np.searchsorted(total, total[-1] * np.arange(most + 1) / most)
        edges = np.unique(np.concatenate([[0], np.clip(edges, 0, n), [n]]))
        if len(edges) <= clusters:
            edges = np.unique(np.linspace(0, n, max(most, clusters) + 1).astype(int))
    w, s, q = line.weight[edges], line.first[edges], line.second[edges]
    weight, first, second = (y[None, :] - y[:, None] for y in (w, s, q))
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = second - first * first / weight
    cost = np.where(weight > 0, np.maximum(cost, 0.0), np.inf)
    best, back = cost[0], []
    for _ in range(clusters - 1):
        through = best[:, None] + cost
        back.append(np.argmin(through, axis=0))
        best = np.take_along_axis(through, back[-1][None], 0)[0]
    cuts = [len(edges) - 1]
    for choice in reversed(back):
        cuts.append(int(choice[cuts[-1]]))
    return edges[np.array([0, *cuts[::-1]])]


def _plus_plus(line: Line, clusters: int, rng: np.random.Generator) -> np.ndarray:
    mass = np.diff(line.weight)
    centers = [rng.choice(line.means, p=mass / mass.sum())]
    distance = np.square(line.means - centers[0])
    for _ in range(clusters - 1):
        chance = mass * distance
        total = chance.sum()
        centers.append(rng.choice(line.means, p=chance / total) if total > 0 else centers[-1])
        distance = np.minimum(distance, np.square(line.means - centers[-1]))
    return np.sort(np.array(centers))


def inertia(x: np.ndarray, centers: np.ndarray, index: np.ndarray, weight: Any = None) -> float:
    """The sum of squared distances, weighted."""
    distance = np.square(x.astype(np.float64) - centers[index])
    return float(distance.sum() if weight is None else (distance * weight).sum())
