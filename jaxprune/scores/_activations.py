"""Scores that read weights and what multiplies them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import _trees
from jaxprune._types import Params, PyTree, Scores, Where


def wanda(params: Params, stats: PyTree, *, where: Where = None) -> Scores:
    """Wanda: `|w| |x|`, the size of a weight times the norm of the input feature that it multiplies.

    Meant to be compared within each output (`pattern=` or `scope="leaf"` of `jp.masks.from_scores`).

    Args:
      params: any tree of arrays.
      stats: of `jp.calibrate` on the same tree.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative float32 scores in the weight's shape, or the scalar `+inf`, also
      for weights that multiplied nothing.

    Raises:
      ValueError: statistics of another tree, or of weights of another shape.

    Example:
      >>> params, x = {"w": jnp.array([[1.0, -2.0], [1.0, 1.0]])}, jnp.array([[3.0, 1.0]])
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> jp.scores.wanda(params, stats)["w"].tolist()
      [[3.0, 6.0], [1.0, 1.0]]

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023,
    https://arxiv.org/abs/2306.11695
    """
    paths, leaves, found, treedef = _matched(params, stats)
    chosen = _trees.select(params, where)
    return treedef.unflatten(
        _wanda(path, leaf, stat)
        if hit and np.any(np.asarray(stat.count))
        else _trees.unpruned_score()
        for path, leaf, stat, hit in zip(paths, leaves, found, chosen, strict=True)
    )


def gram_diagonal(params: Params, stats: PyTree, *, where: Where = None) -> Scores:
    """The mean square of what multiplies each weight: what a squared error of that weight costs.

    The diagonal of the layer's Hessian, up to a factor: `importance=` of `jp.cluster_tree`.

    Args:
      params: any tree of arrays.
      stats: of `jp.calibrate` on the same tree.
      where: which leaves; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative float32 that broadcast against the weights, or the scalar `+inf`,
      also for weights that multiplied nothing.

    Raises:
      ValueError: statistics of another tree, or of weights of another shape.

    Example:
      >>> params, x = {"w": jnp.ones((2, 3))}, jnp.array([[3.0, 1.0]])
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> jp.scores.gram_diagonal(params, stats)["w"].tolist()
      [[9.0], [1.0]]

    Reference: Hassibi & Stork, "Optimal Brain Surgeon", 1992
    """
    paths, leaves, found, treedef = _matched(params, stats)
    chosen = _trees.select(params, where)
    return treedef.unflatten(
        per_entry(path, tuple(leaf.shape), stat, stat.mean_square)
        if hit and np.any(np.asarray(stat.count))
        else _trees.unpruned_score()
        for path, leaf, stat, hit in zip(paths, leaves, found, chosen, strict=True)
    )


def _matched(params: Params, stats: PyTree) -> tuple[list[str], list[Any], list[Any], Any]:
    """Paths, leaves, their statistics, and the treedef."""
    paths, leaves, treedef = _trees.flatten(params)
    try:
        return paths, leaves, treedef.flatten_up_to(stats), treedef
    except ValueError as error:
        raise ValueError(f"stats: of another tree than params ({error})") from error


def _wanda(path: str, leaf: Any, stat: Any) -> Float[Array, "..."]:
    w = jnp.abs(_trees.dense(leaf)).astype(jnp.float32)
    return w * jnp.sqrt(per_entry(path, w.shape, stat, stat.mean_square))


def per_entry(path: str, shape: tuple[int, ...], stat: Any, x: Array) -> Array:
    """Something known of each input feature, beside the weights of `shape` that read it."""
    grouped = int(stat.groups > 1)
    lead = x.ndim - 1 - grouped
    summed = [axis % len(shape) for axis in stat.axes]
    outer = [i for i in range(lead, len(shape)) if i not in summed]
    sizes = [shape[i] for i in summed]
    odd = grouped and (len(outer) != 1 or shape[outer[0]] % stat.groups)
    if odd or x.shape[-1] != np.prod(sizes) or x.shape[:lead] != shape[:lead]:
        raise ValueError(
            f"stats: leaf {path!r} has shape {shape}, its statistics {x.size} features; calibrate again "
            "with these params"
        )
    if not grouped:
        return x.reshape([n if i in summed or i < lead else 1 for i, n in enumerate(shape)])
    x = jnp.repeat(
        x, shape[outer[0]] // stat.groups, axis=lead
    )  # (lead…, output channels, features)
    order = [*range(lead), *outer, *summed]
    return jnp.transpose(x.reshape(*x.shape[:-1], *sizes), np.argsort(order).tolist())
