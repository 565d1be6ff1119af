"""Blocks skipped whole, and tokens or examples routed through them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks


def skip_block(gate: Any, block: Callable[..., Array], x: Array, *args: Any) -> Array:
    """`x + block(x)` if the gate is open, else `x`: the block does not run.

    For one decision (batch 1, or one for the whole batch); under `vmap` both sides run.

    Args:
      gate: a scalar; open above 0.5.
      block: `(x, *args) -> y` of the shape of `x`.
      x: the residual stream.
      *args: more arguments of the block.

    Returns:
      The shape of `x`.

    Raises:
      ValueError: a gate that is no scalar.

    Example:
      >>> x = jnp.ones(2)
      >>> jp.gates.skip_block(jnp.array(0.0), jnp.exp, x).tolist()
      [1.0, 1.0]

    Reference: Wang et al., SkipNet, 2017, https://arxiv.org/abs/1711.09485
    """
    if jnp.size(gate) != 1:
        raise ValueError(
            f"gate: expected one decision, got shape {jnp.shape(gate)}; with one per example use "
            "jp.gates.route_top_k"
        )
    is_open = jnp.reshape(gate, ()) > 0.5
    return jax.lax.cond(is_open, lambda x: x + block(x, *args).astype(x.dtype), lambda x: x, x)


def route_top_k(
    block: Callable[..., Array],
    x: Float[Array, "... n features"],
    scores: Float[Array, "... n"],
    capacity: int,
    *,
    weight: Callable[[Array], Array] | None = None,
) -> Float[Array, "... n features"]:
    """Capacity routing: the block runs on the `capacity` entries that score highest, the others pass by.

    Entries are examples (scores of one axis, the first of `x`) or the tokens of each example (two axes).
    `x + weight(score) block(x)` for the chosen, `x` for the others.

    Args:
      block: `(capacity, …) -> (capacity, …)` on examples, `(batch, capacity, …)` on tokens.
      x: the residual stream.
      scores: (examples,) or (batch, tokens).
      capacity: how many, 1 to all.
      weight: of what the block adds, from the score, which gives scores a gradient: `jax.nn.sigmoid`; by
        default 1.

    Returns:
      The shape of `x`.

    Raises:
      ValueError: a capacity out of range.

    Example:
      >>> x = jnp.array([[1.0], [2.0], [3.0]])
      >>> jp.gates.route_top_k(lambda x: 10 * x, x, jnp.array([0.0, 5.0, 1.0]), 1).ravel().tolist()
      [1.0, 22.0, 3.0]

    Reference: Raposo et al., "Mixture-of-Depths", 2024, https://arxiv.org/abs/2404.02258
    """
    scores = jnp.asarray(scores)
    if scores.ndim not in (1, 2) or scores.shape != x.shape[: scores.ndim]:
        raise ValueError(
            f"scores: shape {scores.shape}, expected the first one or two axes of x, {x.shape}"
        )
    _checks.positive_int("capacity", capacity)
    if capacity > scores.shape[-1]:
        raise ValueError(f"capacity: {capacity} is more than the {scores.shape[-1]} entries")
    best, index = jax.lax.top_k(scores, capacity)
    order = jnp.argsort(index, -1)  # in their own order, as causal blocks expect
    index, best = (jnp.take_along_axis(y, order, -1) for y in (index, best))
    if scores.ndim == 1:
        y = block(jnp.take(x, index, axis=0))
        y = y if weight is None else y * _beside(weight(best), y)
        return x.at[index].add(y.astype(x.dtype))
    rows = jnp.arange(x.shape[0])[:, None]
    y = block(x[rows, index])
    y = y if weight is None else y * _beside(weight(best), y)
    return x.at[rows, index].add(y.astype(x.dtype))


def _beside(w: Array, y: Array) -> Array:
    return w.reshape(w.shape + (1,) * (y.ndim - w.ndim)).astype(y.dtype)
