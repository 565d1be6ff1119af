"""Masks against the trees that optax hands to a transform."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import _checks, _trees
from jaxprune._types import MaskFn, Masks, Params, is_compressed
from jaxprune.masks import resolve, unpack_masks


def fitted(masks: Masks | MaskFn, params: Params) -> Masks:
    """The masks for some parameters, checked: every masked weight can be made zero by an update.

    Raises:
      ValueError: masks that do not fit; an infinite or NaN weight where masked (unless traced).
      TypeError: a mask for a compressed leaf, or for one that is no float.
    """
    tree = resolve(
        masks if _trees.is_function(masks) else placed(unpack_masks(masks), params), params
    )
    check_maskable(params, tree)
    return tree


def placed(masks: Masks, params: Params) -> Masks:
    """Masks in the containers that optax's wrappers hand to `init` in place of the parameters.

    Nodes without arrays (`optax.MaskedNode`, the placeholders of `optax.tree.map_params`, `None`)
    stand for themselves; `LookaheadParams` take the masks twice, a vector of `optax.flatten` joined.

    Raises:
      ValueError: a vector that the masks do not tell the parts of.
    """
    if isinstance(params, optax.LookaheadParams) and not isinstance(masks, optax.LookaheadParams):
        return optax.LookaheadParams(placed(masks, params.fast), placed(masks, params.slow))
    if isinstance(params, jax.Array) and params.ndim == 1 and jax.tree.leaves(masks) != [masks]:
        return _joined(jax.tree.leaves(masks), params.size)
    is_leaf = lambda node: is_compressed(node) or is_empty(node)
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_leaf)
    try:
        found = treedef.flatten_up_to(masks)
    except ValueError:
        return masks  # the check that follows says what does not fit
    return treedef.unflatten(n if is_empty(n) else m for n, m in zip(nodes, found, strict=True))


def spread_over(masks: Masks, params: Params) -> Masks:
    """Masks in the containers of whole parameters: inverse of `placed`, True where they say nothing."""
    if isinstance(params, optax.LookaheadParams):
        pair = masks if isinstance(masks, optax.LookaheadParams) else (masks, masks)
        return optax.LookaheadParams(*map(spread_over, pair, params))
    leaves = _trees.flatten(params)[1]
    if isinstance(masks, jax.Array) and masks.ndim == 1 and leaves != [params]:
        edges = np.cumsum([x.size for x in leaves])[:-1]
        parts = jnp.split(masks, edges)
        return _trees.map_with_path(lambda _, x: parts.pop(0).reshape(x.shape), params)
    nodes, treedef = jax.tree.flatten(masks, is_leaf=is_empty)
    return treedef.unflatten(
        _trees.map_with_path(lambda *_: jnp.array(True), below) if is_empty(node) else node
        for node, below in zip(nodes, treedef.flatten_up_to(params), strict=True)
    )


def is_empty(tree: Any) -> bool:
    """Whether a tree holds no arrays."""
    return not jax.tree.leaves(tree)


def _joined(masks: list[Any], size: int) -> jax.Array:
    """The masks of a flattened tree; scalars `True` that follow each other fill what is missing."""
    scalars = [i for i, m in enumerate(masks) if not jnp.ndim(m)]
    missing = size - sum(m.size for m in masks if jnp.ndim(m))
    in_a_row = scalars == list(range(scalars[0], scalars[-1] + 1)) if scalars else missing == 0
    if missing < len(scalars) or not in_a_row or not all(bool(masks[i]) for i in scalars):
        raise ValueError(
            f"masks: cannot tell where in the {size} entries of optax.flatten each mask belongs; wrap "
            "the other way round, jp.masked_update(optax.flatten(inner), masks), or give each mask "
            "the shape of its parameter"
        )
    parts = [jnp.ravel(m) for m in masks if jnp.ndim(m)]
    before = scalars[0] if scalars else 0
    return jnp.concatenate([*parts[:before], jnp.ones(missing, bool), *parts[before:]])


def check_maskable(params: Params, masks: Masks) -> None:
    """Raises where `param + update` cannot become zero, with the leaf's path and the cure."""
    paths, leaves, treedef = _trees.flatten(params)
    found = treedef.flatten_up_to(masks)
    for path, leaf, mask in zip(paths, leaves, found, strict=True):
        if not takes_update(leaf) and not _all_kept(mask):
            raise TypeError(f"params: leaf {path!r} {cure(leaf)}")
    flags = [_not_finite(p, m) for p, m in zip(leaves, found, strict=True)]
    bad = _checks.flagged(paths, flags)
    if bad:
        raise ValueError(
            f"params: leaf {bad[0]!r} is infinite or NaN where masked, which no update makes zero; "
            "start from jp.apply_masks(params, masks)"
        )


def takes_update(leaf: Any) -> bool:
    """Whether `leaf + update` moves what the leaf stands for: an array of floats."""
    return not is_compressed(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _all_kept(mask: Any) -> bool:
    return jnp.ndim(mask) == 0 and (_checks.is_traced(mask) or bool(mask))


def cure(leaf: Any) -> str:
    """Why no update moves what a leaf stands for, and what to do instead."""
    if not is_compressed(leaf):
        return f"has dtype {jnp.result_type(leaf)}, expected floats where pruned; leave it out by `where`"
    if getattr(type(leaf), "is_trained", False):
        return (
            f"is a {type(leaf).__name__}, which masks itself: jp.qat.prepare(params, masks=masks) "
            "under the plain optimizer"
        )
    return (
        f"is a {type(leaf).__name__}, whose weights no update makes zero; prune before compressing "
        "(zeros stay zero), and train with jp.optim.trainable(inner)"
    )


def _not_finite(param: Any, mask: Any) -> Any:
    if not takes_update(param) or (not np.ndim(mask) and _all_kept(mask)):
        return False
    return _any_not_finite(param, mask)


@jax.jit
def _any_not_finite(param: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.any(~mask & ~jnp.isfinite(param))
