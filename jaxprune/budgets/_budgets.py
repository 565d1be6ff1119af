"""Budgets: how sparse each leaf becomes for a given sparsity of the whole.

A budget is a tree like the parameters with one Python float per leaf, the fraction to remove; leaves
that are not pruned get 0.
"""

from typing import Any

import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Where


def uniform(params: Params, sparsity: float, *, uses: Any = None, where: Where = None) -> PyTree:
    """The same sparsity for every selected leaf.

    Args:
      params: any tree of arrays, or of `jax.ShapeDtypeStruct`.
      sparsity: fraction to remove, in [0, 1].
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves are pruned; by default the weights.

    Returns:
      Tree like `params` of Python floats: `sparsity` where selected, else 0.

    Raises:
      ValueError: a sparsity outside [0, 1], or a `where` pattern that matches nothing.

    Example:
      >>> jp.budgets.uniform({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, 0.8)
      {'b': 0.0, 'w': 0.8}
    """
    _checks.fraction("sparsity", sparsity)
    return _trees.map_selected(
        lambda _: float(sparsity), lambda _: 0.0, params, where=where, uses=uses
    )


def erk(params: Params, sparsity: float, *, uses: Any = None, where: Where = None) -> PyTree:
    """Erdős–Rényi-Kernel: the density of a leaf is proportional to `sum(shape) / prod(shape)`.

    Small leaves stay denser than large ones. Where the rule would give a leaf a density above 1 it
    stays dense, and the others share the rest, so that the total is `sparsity` exactly.

    Args:
      params: any tree of arrays, or of `jax.ShapeDtypeStruct`.
      sparsity: fraction to remove of the selected leaves together, in [0, 1].
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves are pruned; by default the weights.

    Returns:
      Tree like `params` of Python floats in [0, 1].

    Raises:
      ValueError: a sparsity outside [0, 1], or a `where` pattern that matches nothing.

    Example:
      >>> params = {"big": jnp.ones((100, 100)), "small": jnp.ones((10, 10))}
      >>> {k: round(s, 3) for k, s in jp.budgets.erk(params, 0.9).items()}
      {'big': 0.908, 'small': 0.082}

    Reference: Evci et al., "Rigging the Lottery", 2020, https://arxiv.org/abs/1911.11134
    """
    _checks.fraction("sparsity", sparsity)
    _, leaves, treedef = _trees.flatten(params)
    selected = _trees.select(params, where, uses=uses)
    chosen = [i for i, hit in enumerate(selected) if hit and _size(leaves[i].shape)]
    sizes = np.array([_size(leaves[i].shape) for i in chosen], float)
    stacked = [() if uses is None else use.stacked for use in _trees.uses_of(params, uses)]
    raw = np.array([_density(leaves[i].shape, stacked[i]) for i in chosen])
    densities = _scaled(raw, sizes, (1.0 - float(sparsity)) * sizes.sum())
    fractions = [0.0] * len(leaves)
    for i, density in zip(chosen, densities, strict=True):
        fractions[i] = float(1.0 - density)
    return treedef.unflatten(fractions)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _density(shape: tuple[int, ...], stacked: tuple[int, ...]) -> float:
    """Relative density of each layer of a leaf."""
    layer = [n for i, n in enumerate(shape) if i - len(shape) not in stacked]
    return sum(layer) / max(_size(tuple(layer)), 1)


def _scaled(raw: np.ndarray, sizes: np.ndarray, total: float) -> np.ndarray:
    """`min(1, c * raw)` with the `c` for which `sum(density * sizes) == total`."""
    is_dense = np.zeros(len(raw), bool)
    while True:
        free = ~is_dense
        if not free.any():
            return np.ones(len(raw))
        scale = max(total - sizes[is_dense].sum(), 0.0) / (raw * sizes)[free].sum()
        over = free & (scale * raw > 1.0)
        if not over.any():
            return np.where(is_dense, 1.0, scale * raw)
        is_dense |= over
