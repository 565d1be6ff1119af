"""Weights that stay on few values while they train."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Where
from jaxprune.optim._masked import required
from jaxprune.share import assigned, line_start, line_turn

_TURNS = 20


class ClusteredState(NamedTuple):
    """State of `clustered`.

    Attributes:
      step: updates made.
      latent: tree like the parameters: the dense weights that are clustered; a scalar 0 for others.
      centers: their centroids, (clusters,), ascending; a scalar 0 for others.
      inner_state: state of the wrapped transform.
    """

    step: jax.Array
    latent: PyTree
    centers: PyTree
    inner_state: optax.OptState


def clustered(
    inner: optax.GradientTransformation,
    bits: int = 4,
    *,
    every: int = 1,
    turns: int = 2,
    zero: bool = False,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with shared values: after `optax.apply_updates`, weights lie on `2 ** bits` centroids
    (exactly from the second step on, since the first starts from any numbers).

    `inner` moves dense weights that the state holds (gradients pass straight through the clusters); the
    parameters are their clusters. Every `every` steps some of Lloyd's turns move the centroids after
    them. `jp.cluster_tree(params, bits)` afterwards finds exactly these values.

    Args:
      inner: any optax transform.
      bits: 1 to 8.
      every: steps between two updates of centroids, at least 1; weights change clusters in every step.
      turns: of Lloyd's iteration at each.
      zero: weights that are 0 at `init` stay exactly 0, and one centroid less serves the rest.
      where: which leaves; by default floating leaves with two axes or more.

    Returns:
      A transform whose state is a `ClusteredState`.

    Raises:
      ValueError: numbers out of range; `params` missing (from `update`).

    Example:
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
      >>> tx = jp.optim.clustered(optax.sgd(0.1), bits=2)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.ones((8, 8))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> jnp.unique(params["w"]).size
      4

    Reference: Han et al., "Deep Compression", 2015, https://arxiv.org/abs/1510.00149
    """
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise ValueError(f"bits: expected 1 to 8, got {bits!r}")
    _checks.positive_int("every", every)
    _checks.positive_int("turns", turns)
    inner = optax.with_extra_args_support(inner)
    count = 2**bits - zero

    def start(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1).astype(jnp.float32)
        weight = (flat != 0).astype(jnp.float32) if zero else None
        turn = lambda _, centers: line_turn(flat, centers, weight)
        return jax.lax.fori_loop(0, _TURNS, turn, line_start(flat, count))

    def on_grid(centers: jax.Array) -> jax.Array:
        # differences of numbers on a grid of 23 bits are exact: parameters plus updates are centroids
        top = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(jnp.max(jnp.abs(centers)), 1e-30))))
        step = top * 2.0**-22
        return jnp.round(centers / step) * step

    def init(params: Params) -> ClusteredState:
        other = lambda _: jnp.zeros(())
        copy = lambda x: jnp.array(_trees.dense(x), jnp.float32, copy=True)
        latent = _trees.map_selected(copy, other, params, where=where)
        centers = _trees.map_selected(lambda x: jax.jit(start)(x), other, params, where=where)
        return ClusteredState(jnp.zeros((), jnp.int32), latent, centers, inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ClusteredState]:
        params = required(params, "clustered")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        due = state.step % every == 0

        def moved(latent: jax.Array, u: jax.Array) -> jax.Array:
            if latent.ndim == 0:
                return latent
            found = latent + u.astype(latent.dtype)
            return jnp.where(latent == 0, 0.0, found) if zero else found

        def recentred(centers: jax.Array, latent: jax.Array) -> jax.Array:
            if latent.ndim == 0:
                return centers
            flat = latent.reshape(-1)
            weight = (flat != 0).astype(jnp.float32) if zero else None
            turn = lambda _, c: line_turn(flat, c, weight)
            return jax.lax.cond(
                due, lambda c: jax.lax.fori_loop(0, turns, turn, c), lambda c: c, centers
            )

        def emitted(u: jax.Array, p: jax.Array, latent: jax.Array, centers: jax.Array) -> jax.Array:
            if latent.ndim == 0:
                return u
            value = on_grid(centers)[assigned(latent, centers).astype(jnp.int32)]
            value = jnp.where(latent == 0, 0.0, value) if zero else value
            return value.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32)

        latent = jax.tree.map(moved, state.latent, updates)
        centers = jax.tree.map(recentred, state.centers, latent)
        out = jax.tree.map(emitted, updates, params, latent, centers)
        return out, ClusteredState(state.step + 1, latent, centers, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
