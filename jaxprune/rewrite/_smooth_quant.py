"""Outliers of activations moved into weights, so that both fit in 8 bits (SmoothQuant)."""

import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree
from jaxprune.calibration import (
    Scaling,
    Stats,
    apply_factors,
    holds,
    ranges,
    scalings_of,
    stats_leaves,
    with_scaled,
)
from jaxprune.graph import Place, trace

_SHOWN = 5


class _Readers(NamedTuple):
    """One scaling as it concerns activations.

    Attributes:
      scaling: its exponents are 1 for the weights that read the activations.
      places: where these lie.
    """

    scaling: Scaling
    places: list[Place]


def smooth_quant(
    fn: Any, params: Params, stats: PyTree, *args: Any, alpha: float = 0.5, **kwargs: Any
) -> Params:
    """SmoothQuant: per channel, activations divided by `s` and the weights that read them multiplied.

    With `s = max|X|^alpha / max|W|^(1 - alpha)` for each input channel of a product, whatever makes the
    channel (the scale of a normalisation, the outputs of a product before) is divided by `s`, and every
    weight that reads it is multiplied: `fn` computes the same, and 8-bit activations lose less. Where
    that is possible is found from the gradients of the traced function and tried out; nothing is
    annotated. What cannot be smoothed is told.

    Args:
      fn: `fn(params, *args, **kwargs)`, differentiable.
      params: any tree of arrays.
      stats: of `jp.calibrate(fn, params, batches)`.
      *args, **kwargs: real inputs, a few examples: scalings are looked for and checked on them.
      alpha: how much of the outliers goes into the weights, in [0, 1].

    Returns:
      The tree with other weights, for `jp.quantize_tree` and `jp.compressed(fn, activations="int8")`.

    Raises:
      ValueError: an alpha outside [0, 1], statistics of another tree, or no example inputs where `fn`
        takes some.

    Warns:
      UserWarning: weights whose inputs cannot be scaled, or none that can.

    Example:
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.array([[100.0, 1.0]]), "b": jnp.ones((2, 1))}
      >>> x = jnp.ones((4, 1))
      >>> even = jp.smooth_quant(fn, params, jp.calibrate(fn, params, [x]), x)  # warns of "a"
      >>> even["a"].tolist(), even["b"].tolist()
      ([[10.0, 1.0]], [[10.0], [1.0]])

    Reference: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models", 2022, https://arxiv.org/abs/2211.10438
    """
    _checks.fraction("alpha", alpha)
    paths, leaves, treedef = _trees.flatten(params)
    found = stats_leaves(stats, paths)
    graph = trace(fn, params, *args, **kwargs)
    call = jax.jit(lambda leaves: fn(treedef.unflatten(leaves), *args, **kwargs))
    wide = [np.asarray(x, np.float32) if _trees.is_floating(x) else x for x in leaves]
    known = (_reading(s, found) for s in scalings_of(graph, call, leaves, frozen=True))
    readers = [r for r in known if r is not None and holds(call, leaves, wide, r.scaling)]
    largest = [np.asarray(stat.absmax, np.float32) for stat in found]
    for each in readers:
        _smooth(wide, largest, found, each, float(alpha))
    smoothed = {place.leaf for each in readers for place in each.places}
    _tell([path for i, path in enumerate(paths) if found[i].axes and i not in smoothed], readers)
    return treedef.unflatten(with_scaled(leaves, wide, [each.scaling for each in readers]))


def _reading(scaling: Scaling, stats: list[Stats]) -> _Readers | None:
    """The scaling with exponents 1 for weights that read activations; `None` where no side is that."""
    for sign in (1.0, -1.0):
        places = scaling.weights(sign)
        if places and all(_reads(place, stats[place.leaf]) for place in places):
            return _Readers(scaling._replace(exponents=sign * scaling.exponents), places)
    return None


def _reads(place: Place, stat: Stats) -> bool:
    """Whether a leaf's products sum over the axis, with statistics for all of its stack together."""
    if not stat.axes or stat.groups > 1:
        return False
    ndim = stat.uses.ndim
    return ndim is not None and stat.mean.ndim == 1 and place.axis - ndim in stat.axes


def _smooth(
    leaves: list[Any], largest: list[Any], stats: list[Stats], each: _Readers, alpha: float
) -> None:
    """Scales one set of channels, in place, and what is known of their activations with them."""
    size = each.scaling.size
    activations = np.zeros(size, np.float32)
    for place in each.places:
        seen, axis = _by_axis(largest[place.leaf], stats[place.leaf], place, leaves)
        by_entry = seen.max(tuple(i for i in range(seen.ndim) if i != axis))
        np.maximum.at(activations, place.units, by_entry[place.slices])
    weights = ranges(leaves, each.places, size)
    live = (activations > 0) & (weights > 0)
    safe = lambda x: np.where(live, x, 1.0)
    factors = safe(activations) ** alpha / safe(weights) ** (1.0 - alpha)
    apply_factors(leaves, each.scaling, np.where(live, factors, 1.0))
    for place in each.places:
        seen, axis = _by_axis(largest[place.leaf], stats[place.leaf], place, leaves)
        divisor = np.ones(seen.shape[axis], np.float32)
        divisor[place.slices] = np.where(live, factors, 1.0)[place.units]
        shape = [-1 if i == axis else 1 for i in range(seen.ndim)]
        largest[place.leaf] = (seen / divisor.reshape(shape)).reshape(-1)


def _by_axis(
    seen: np.ndarray, stat: Stats, place: Place, leaves: list[Any]
) -> tuple[np.ndarray, int]:
    """Features laid out as the axes that are summed, and which of them the channels lie on."""
    shape = leaves[place.leaf].shape
    sizes = [shape[axis] for axis in stat.axes]
    return seen.reshape(sizes), stat.axes.index(place.axis - len(shape))


def _tell(left: list[str], readers: list[_Readers]) -> None:
    """Warns of weights that are as they were."""
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        what = "these weights stay as they are" if readers else "nothing is smoothed"
        warnings.warn(
            f"smooth_quant: {what}, since no scaling of their inputs leaves the outputs as they are "
            "(inputs of the function, or channels that a residual sum or a nonlinearity reads too): "
            f"{', '.join(map(repr, left[:_SHOWN]))}{more}",
            stacklevel=3,
        )
