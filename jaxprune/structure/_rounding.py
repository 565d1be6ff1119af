"""Numbers of units that a platform computes as fast as it can."""

import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from jaxprune.graph import Graph, Group, places_of
from jaxprune.structure._scoring import kernels_of

Rounding = Callable[[int], int]
"""From how many units of a group should stay to how many do."""

# (widths up to, multiples there), ascending. CPU: as measured with XLA of JAX 0.10 and 0.12 on AVX-512,
# where a 3 x 3 convolution to 20 to 28 channels takes longer than one to 32, and one to 36 to 63 longer
# than one to 64. GPU: tiles of tensor cores. TPU: 8 sublanes, 128 lanes.
_MULTIPLES: dict[str, tuple[tuple[float, int], ...]] = {
    "cpu": ((16, 8), (32, 16), (math.inf, 32)),
    "gpu": ((64, 8), (math.inf, 64)),
    "tpu": ((128, 8), (math.inf, 128)),
}


def by_number(groups: list[Group], multiple: int, least: int) -> list[Rounding]:
    """The nearest multiple, of groups as large as one; at least `least` units stay."""
    return [partial(_nearest, size=group.size, step=multiple, least=least) for group in groups]


def by_platform(graph: Graph, groups: list[Group], least: int, *, finer: int = 1) -> list[Rounding]:
    """The nearest width at which the default backend gains, its multiples divided by `finer`."""
    multiples = _multiples()
    kernels = kernels_of(graph)
    return [
        partial(
            _nearest_gain,
            size=group.size,
            block=_entries_per_unit(graph, group, kernels),
            multiples=tuple((bound, max(m // finer, 1)) for bound, m in multiples),
            least=least,
        )
        for group in groups
    ]


def largest_multiple() -> int:
    """The largest multiple of the default backend: divided by it, all counts are allowed."""
    return _multiples()[-1][1]


def _multiples() -> tuple[tuple[float, int], ...]:
    return _MULTIPLES.get(jax.default_backend(), _MULTIPLES["cpu"])


def _nearest(left: int, *, size: int, step: int, least: int) -> int:
    left = max(left, min(least, size))
    if size < step:
        return left
    left = min(max(round(left / step), 1) * step, size)
    return max(left, min(-(-least // step) * step, size))


def _nearest_gain(
    left: int, *, size: int, block: int, multiples: tuple[tuple[float, int], ...], least: int
) -> int:
    step = next(m for bound, m in multiples if left * block <= bound)
    return _nearest(left, size=size, step=-(-step // block), least=least)


def _entries_per_unit(graph: Graph, group: Group, kernels: frozenset[int]) -> int:
    """How many columns (or rows) of its narrowest matrix a unit takes: 1 a channel, 64 a head of 64."""
    uses = graph.treedef.flatten_up_to(graph.uses)
    found = []
    for place in places_of(graph, group):
        if place.leaf not in kernels:
            continue
        shape = graph.shapes[place.leaf]
        own = place.axis - len(shape)
        for axes in (uses[place.leaf].free, uses[place.leaf].contracted):
            if own in axes:
                others = int(np.prod([shape[a] for a in axes if a != own]))
                found.append(max(len(place.slices) // group.size, 1) * others)
    return min(found, default=1)
