"""Budgets that need shapes alone."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune import _trees
from jaxprune._types import Params, PyTree, Where
from jaxprune._uses import Uses
from jaxprune.budgets._share import Bound, share_of


def uniform(
    params: Params,
    sparsity: float,
    *,
    uses: Any = None,
    where: Where = None,
    max_sparsity: Bound = 1.0,
    min_keep: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> PyTree:
    """The same sparsity for every selected leaf, as far as bounds allow.

    Args:
      params: any tree of arrays, or of `jax.ShapeDtypeStruct`.
      sparsity: fraction to remove, in [0, 1].
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves are pruned; by default the weights.
      max_sparsity: the most that a leaf may lose; or `{regular expression of paths: fraction}`.
      min_keep: entries that a leaf keeps at least; of stacked leaves (by `uses`) each layer.
      fixed: `{regular expression of paths: fraction to remove}`, for first and last layers; they count in
        the total.

    Returns:
      Tree like `params` of Python floats: `sparsity` where selected, else 0.

    Raises:
      ValueError: a sparsity outside [0, 1] or out of reach of the bounds, a pattern that matches nothing.

    Example:
      >>> jp.budgets.uniform({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, 0.5)
      {'b': 0.0, 'w': 0.5}
      >>> params = {"first": jnp.ones((2, 4)), "rest": jnp.ones((4, 4))}
      >>> jp.budgets.uniform(params, 0.5, fixed={"first": 0.0})
      {'first': 0.0, 'rest': 0.75}
    """
    share = share_of(
        params,
        sparsity,
        uses=uses,
        where=where,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        fixed=fixed,
    )
    return share.scaled(np.ones(len(share.sizes)))


def er(
    params: Params,
    sparsity: float,
    *,
    uses: Any = None,
    where: Where = None,
    max_sparsity: Bound = 1.0,
    min_keep: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> PyTree:
    """Erdős–Rényi: the density of a leaf is proportional to `(inputs + outputs) / (inputs outputs)`.

    The window of a convolution does not count, as it does in `erk`.

    Args:
      params: any tree of arrays, or of `jax.ShapeDtypeStruct`.
      sparsity: fraction to remove of the selected leaves together, in [0, 1].
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves are pruned; by default the weights.
      max_sparsity: the most that a leaf may lose; or `{regular expression of paths: fraction}`.
      min_keep: entries that a leaf keeps at least; of stacked leaves (by `uses`) each layer.
      fixed: `{regular expression of paths: fraction to remove}`, for first and last layers; they count in
        the total.

    Returns:
      Tree like `params` of Python floats in [0, 1].

    Raises:
      ValueError: a sparsity outside [0, 1] or out of reach of the bounds, a pattern that matches nothing.

    Example:
      >>> params = {"conv": jnp.ones((3, 3, 10, 10)), "dense": jnp.ones((30, 30))}
      >>> {k: round(s, 3) for k, s in jp.budgets.er(params, 0.9).items()}
      {'conv': 0.85, 'dense': 0.95}

    Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity", 2018, https://arxiv.org/abs/1707.04780
    """
    share = share_of(
        params,
        sparsity,
        uses=uses,
        where=where,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        fixed=fixed,
    )
    ends = [
        _ends(leaf.shape, use if uses is not None else None)
        for leaf, use in zip(share.leaves, share.uses, strict=True)
    ]
    return share.scaled([(a + b) / (a * b) for a, b in ends])


def erk(
    params: Params,
    sparsity: float,
    *,
    uses: Any = None,
    where: Where = None,
    max_sparsity: Bound = 1.0,
    min_keep: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> PyTree:
    """Erdős–Rényi-Kernel: the density of a leaf is proportional to `sum(shape) / prod(shape)`.

    Small leaves stay denser than large ones. Where the rule would give a leaf a density above 1 it
    stays dense, and the others share the rest, so that the total is `sparsity` exactly.

    Args:
      params: any tree of arrays, or of `jax.ShapeDtypeStruct`.
      sparsity: fraction to remove of the selected leaves together, in [0, 1].
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves are pruned; by default the weights.
      max_sparsity: the most that a leaf may lose; or `{regular expression of paths: fraction}`.
      min_keep: entries that a leaf keeps at least; of stacked leaves (by `uses`) each layer.
      fixed: `{regular expression of paths: fraction to remove}`, for first and last layers; they count in
        the total.

    Returns:
      Tree like `params` of Python floats in [0, 1].

    Raises:
      ValueError: a sparsity outside [0, 1] or out of reach of the bounds, a pattern that matches nothing.

    Example:
      >>> params = {"big": jnp.ones((100, 100)), "small": jnp.ones((10, 10))}
      >>> {k: round(s, 3) for k, s in jp.budgets.erk(params, 0.9).items()}
      {'big': 0.908, 'small': 0.082}

    Reference: Evci et al., "Rigging the Lottery", 2020, https://arxiv.org/abs/1911.11134
    """
    share = share_of(
        params,
        sparsity,
        uses=uses,
        where=where,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        fixed=fixed,
    )
    layers = [
        [
            n
            for i, n in enumerate(leaf.shape)
            if uses is None or i - len(leaf.shape) not in use.stacked
        ]
        for leaf, use in zip(share.leaves, share.uses, strict=True)
    ]
    return share.scaled([sum(layer) / max(np.prod(layer), 1) for layer in layers])


def linear(
    params: Params,
    sparsity: float,
    *,
    slope: float = 0.2,
    order: Sequence[str] | None = None,
    uses: Any = None,
    where: Where = None,
    max_sparsity: Bound = 1.0,
    min_keep: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> PyTree:
    """Sparsity that grows evenly with depth: later leaves lose more.

    Args:
      params: any tree of arrays, or of `jax.ShapeDtypeStruct`.
      sparsity: fraction to remove of the selected leaves together, in [0, 1].
      slope: sparsity of the last leaf less that of the first, in [-1, 1].
      order: regular expressions of paths, shallow first, that together match every selected leaf; leaves
        that one expression matches are as deep. By default the natural order of paths, in which
        `layers_10` follows `layers_2`, one depth each.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves are pruned; by default the weights.
      max_sparsity: the most that a leaf may lose; or `{regular expression of paths: fraction}`.
      min_keep: entries that a leaf keeps at least; of stacked leaves (by `uses`) each layer.
      fixed: `{regular expression of paths: fraction to remove}`, for first and last layers; they count in
        the total.

    Returns:
      Tree like `params` of Python floats in [0, 1].

    Raises:
      ValueError: a sparsity outside [0, 1] or out of reach of the bounds, a pattern that matches nothing.

    Example:
      >>> params = {f"layers_{i}": jnp.ones((4, 4)) for i in (0, 5, 10)}
      >>> {k: round(s, 3) for k, s in jp.budgets.linear(params, 0.5, slope=0.4).items()}
      {'layers_0': 0.3, 'layers_10': 0.7, 'layers_5': 0.5}
    """
    if not -1.0 <= float(slope) <= 1.0:
        raise ValueError(f"slope: expected a number in [-1, 1], got {slope}")
    share = share_of(
        params,
        sparsity,
        uses=uses,
        where=where,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        fixed=fixed,
    )
    depths = np.array(_depths(share.paths, order), float)
    return share.shifted(-slope * depths / max(np.max(depths, initial=0.0), 1.0))


def _ends(shape: tuple[int, ...], use: Uses | None) -> tuple[float, float]:
    """Inputs and outputs of a weight: its last two axes where no program was read."""
    if use is None:
        return float(shape[-2] if len(shape) > 1 else 1), float(shape[-1])
    size = lambda axes: float(np.prod([shape[axis] for axis in axes]))
    if not use.contracted:  # a look-up: tokens and features
        rest = [i for i in range(-len(shape), 0) if i not in (*use.stacked, *use.free)]
        return size(use.free), size(rest)
    return size(use.contracted), size(use.free)


def _depths(paths: list[str], order: Sequence[str] | None) -> list[int]:
    if order is None:
        natural = sorted(paths, key=_natural)
        return [natural.index(path) for path in paths]
    patterns = [_trees.compile_pattern(pattern, parameter="order") for pattern in order]
    found = [
        next((depth for depth, regex in enumerate(patterns) if regex.fullmatch(path)), None)
        for path in paths
    ]
    for path, depth in zip(paths, found, strict=True):
        if depth is None:
            raise ValueError(
                f"order: no pattern matches {path!r}; add one, or leave it out by where="
            )
    for depth, pattern in enumerate(order):
        if depth not in found:
            raise ValueError(_trees.no_match(pattern, paths, parameter="order"))
    return [depth for depth in found if depth is not None]


def _natural(path: str) -> list[tuple[int, int, str]]:
    """A key by which numbers within names count as numbers."""
    parts = re.split(r"(\d+)", path)
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in parts if x]
