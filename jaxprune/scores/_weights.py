"""Scores that read the weights alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _trees
from jaxprune._types import Params, Scores, Where


def magnitude(params: Params, *, uses: Any = None, where: Where = None) -> Scores:
    """`|w|`: large weights matter.

    Args:
      params: any tree of arrays; compressed leaves score as what they stand for.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative scores in the weight's shape and dtype, or the scalar `+inf`.

    Raises:
      ValueError: a `where` pattern that matches no floating leaf.

    Example:
      >>> jp.scores.magnitude({"w": jnp.array([[3.0, -1.0]]), "b": jnp.zeros(2)})
      {'b': Array(inf, dtype=float32), 'w': Array([[3., 1.]], dtype=float32)}

    Reference: Han et al., "Learning both Weights and Connections", 2015,
    https://arxiv.org/abs/1506.02626
    """
    return _trees.map_selected(
        lambda w: jnp.abs(_trees.dense(w)),
        lambda _: _trees.unpruned_score(),
        params,
        where=where,
        uses=uses,
    )


def random(params: Params, key: jax.Array, *, uses: Any = None, where: Where = None) -> Scores:
    """Uniform random scores in [0, 1): the baseline that every score should beat.

    Args:
      params: any tree of arrays.
      key: a PRNG key; each leaf draws from a key of its own.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: float32 scores in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: a `where` pattern that matches no floating leaf.

    Example:
      >>> scores = jp.scores.random({"w": jnp.ones((2, 3))}, jax.random.key(0))
      >>> scores["w"].shape
      (2, 3)
    """
    _, leaves, treedef = _trees.flatten(params)
    keys = treedef.unflatten(list(jax.random.split(key, max(len(leaves), 1))[: len(leaves)]))
    return _trees.map_selected(
        lambda w, k: jax.random.uniform(k, w.shape),
        lambda _: _trees.unpruned_score(),
        params,
        keys,
        where=where,
        uses=uses,
    )


def lamp(params: Params, *, uses: Any = None, where: Where = None) -> Scores:
    """LAMP: `w^2` over the sum of the squares of all weights in the leaf that are not smaller.

    Within a leaf the order is that of magnitude; between leaves it balances the layers, since the
    largest weight of every leaf scores 1. Use it with `scope="global"`.

    Args:
      params: any tree of arrays.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: float32 scores in [0, 1] in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: a `where` pattern that matches no floating leaf.

    Example:
      >>> jp.scores.lamp({"w": jnp.array([[1.0, 2.0, 2.0]])})["w"].round(2)
      Array([[0.11, 0.5 , 1.  ]], dtype=float32)

    Reference: Lee et al., "Layer-adaptive sparsity for the Magnitude-based Pruning", 2021,
    https://arxiv.org/abs/2010.07611
    """
    return _trees.map_selected(
        lambda w: _lamp(_trees.dense(w)),
        lambda _: _trees.unpruned_score(),
        params,
        where=where,
        uses=uses,
    )


@jax.jit
def _lamp(w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # relative to the largest weight, so that squares neither overflow nor vanish
    magnitude = jnp.abs(w.astype(jnp.float32)).reshape(-1)
    peak = jnp.max(magnitude, initial=0.0)
    squares = jnp.square(magnitude / jnp.where(peak > 0, peak, 1.0))
    order = jnp.argsort(squares)  # stable: of equal weights, the later one scores higher
    ascending = squares[order]
    tails = jnp.cumsum(ascending[::-1])[::-1]
    scores = ascending / jnp.where(tails > 0, tails, 1.0)
    # rounding of the sums must not turn the order of magnitude round
    scores = jax.lax.cummax(scores)
    return jnp.zeros_like(squares).at[order].set(scores).reshape(w.shape)
