"""Synaptic flow: a score that needs neither data nor labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _trees
from jaxprune._types import Params, PyTree, Scores, Where
from jaxprune.scores._chosen import chosen_of


def synflow(
    fn: Callable[..., Any], params: Params, *inputs: Any, uses: Any = None, where: Where = None
) -> Scores:
    """SynFlow: `|w| dR/d|w|` with `R = sum fn(|params|, ones)`, the paths that lead through a weight.

    All floating leaves are taken by their magnitude, statistics of norms too; floating inputs are
    replaced by ones, others (tokens, flags) stay. Scores are divided by `R`: in a network without
    branches those of each layer sum to 1. A single round cuts whole layers off; use it in many:
    `jp.masks.iterative`.

    `R` is a product over layers and overflows float32 in deep networks. It is computed in float64,
    whatever `jax_enable_x64` says; layers that fix their type (`dtype=jnp.float32`) keep it.

    Args:
      fn: `fn(params, *inputs)`, an array or a tree of them; its floating results are summed.
      params: any tree of dense arrays.
      *inputs: what follows `params` in `fn`; a batch of one suffices.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative float32 scores in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: no floating result, a NaN or an overflow, or a `where` that matches nothing.
      TypeError: compressed leaves.

    Example:
      >>> fn = lambda p, x: x @ p["a"] @ p["b"]
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [0.5]])}
      >>> scores = jp.scores.synflow(fn, params, jnp.zeros((1, 1)))
      >>> scores["a"].tolist(), scores["b"].tolist()
      ([[0.75, 0.25]], [[0.75], [0.25]])

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", 2020, https://arxiv.org/abs/2006.05467
    """
    chosen = chosen_of(params, where, uses)
    with jax.enable_x64(True):
        whole = jax.tree.map(_magnitude, params)
        ones = jax.tree.map(_ones, inputs)
        magnitudes = chosen_of(whole, where, uses)
        flow, slopes = jax.value_and_grad(
            lambda leaves: _total(fn(magnitudes.params(leaves), *ones))
        )(magnitudes.leaves)
        total = jnp.where(flow > 0, flow, 1.0)  # nothing flows: all score 0
        found = [w * g / total for w, g in zip(magnitudes.leaves, slopes, strict=True)]
        found = [jax.lax.convert_element_type(x, jnp.float32) for x in found]
    return chosen.scores("synflow", found)


def _magnitude(leaf: Any) -> Any:
    """`|leaf|` in float64; what is no floating array stays."""
    if not _trees.is_floating(leaf):
        return leaf
    return jnp.abs(jax.lax.convert_element_type(jnp.asarray(leaf), jnp.float64))


def _ones(x: Any) -> Any:
    return jnp.ones(jnp.shape(x), jnp.float64) if _trees.is_floating(x) else x


def _total(results: PyTree) -> Array:
    floating = [x for x in jax.tree.leaves(results) if _trees.is_floating(x)]
    if not floating:
        raise ValueError("fn: expected floating results, got none; return logits or features")
    return jnp.sum(jnp.stack([jnp.sum(x, dtype=jnp.float64) for x in floating]))
