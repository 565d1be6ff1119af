"""The range of activations that a quantizer covers, from their statistics."""

import numpy as np

from jaxprune.calibration._stats import Stats, magnitudes

METHODS = ("absmax", "moving_average", "percentile", "mse")


def range_of(
    stats: Stats, method: str, *, symmetric: bool, bits: int, percentile: float
) -> tuple[np.ndarray, np.ndarray]:
    """The least and largest value to represent, 0 between them; arrays over stacked layers.

    Args:
      stats: of one weight.
      method: `"absmax"` (everything seen), `"moving_average"`, `"percentile"` or `"mse"` (the range with
        the smallest mean squared error; Banner et al., 2019).
      symmetric: the range is `[-t, t]`.
      bits: of the codes, for `"mse"`.
      percentile: fraction of entries inside, for `"percentile"`.
    """
    low, high = np.asarray(stats.low), np.asarray(stats.high)
    if method == "moving_average":
        low, high = np.asarray(stats.moving_low), np.asarray(stats.moving_high)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if method in ("percentile", "mse"):
        assert stats.histogram is not None
        counts = np.asarray(stats.histogram, np.float64)
        flat = counts.reshape(-1, *counts.shape[-2:])
        ends = [
            _by_percentile(c, symmetric, percentile)
            if method == "percentile"
            else _by_error(c, symmetric, bits, (float(a), float(b)))
            for c, a, b in zip(flat, low.reshape(-1), high.reshape(-1), strict=True)
        ]
        low = np.maximum(low, np.reshape([a for a, _ in ends], low.shape))
        high = np.minimum(high, np.reshape([b for _, b in ends], high.shape))
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    return low, high


def _by_percentile(counts: np.ndarray, symmetric: bool, fraction: float) -> tuple[float, float]:
    edges, total = magnitudes(), counts.sum()
    if symmetric:
        top = edges[np.searchsorted(np.cumsum(counts.sum(0)), fraction * total)]
        return -top, top
    outside = (1.0 - fraction) * total / 2  # on each side
    tops = []
    for side in counts:  # from the largest magnitude down, entries that may lie outside
        beyond = np.cumsum(side[::-1])[::-1]
        inside = np.flatnonzero(beyond > outside)
        tops.append(edges[inside[-1]] if len(inside) else 0.0)
    return -tops[0], tops[1]


def _by_error(
    counts: np.ndarray, symmetric: bool, bits: int, ends: tuple[float, float]
) -> tuple[float, float]:
    """Both ends shrunk by one factor, to the least squared error of clipping and rounding."""
    centres = magnitudes() * 2.0 ** (-0.5 / 32)
    low, high = ends
    if symmetric:
        high = max(-low, high)
        low = -high
    best, chosen = np.inf, (low, high)
    for factor in 2.0 ** -np.arange(0, 8, 1 / 16):
        a, b = low * factor, high * factor
        step = (b - a) / (2**bits - 1)
        error = 0.0
        for side, end in ((0, -a), (1, b)):
            beyond = np.maximum(centres - end, 0.0)
            rounding = np.minimum(step**2 / 12, centres**2)
            error += float(np.sum(counts[side] * np.where(beyond > 0, beyond**2, rounding)))
        if error < best:
            best, chosen = error, (a, b)
    return chosen
