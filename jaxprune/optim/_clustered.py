"""Weights that stay on few values while they train."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Where, is_compressed
from jaxprune.optim._fit import cure, is_empty
from jaxprune.optim._masked import required
from jaxprune.share import assigned, line_start, line_turn

_START_ITERATIONS = 20


class ClusteredState(NamedTuple):
    """State of `clustered`.

    Attributes:
      step: int32 scalar, updates so far; also `.count`, see `GradualState`.
      latent: tree like the parameters: the dense weights that are clustered; a scalar 0 for others.
      centers: their centroids, (clusters,), ascending; a scalar 0 for others.
      inner_state: state of the wrapped transform.
    """

    step: Int[Array, ""]
    latent: PyTree
    centers: PyTree
    inner_state: optax.OptState

    @property
    def count(self) -> Int[Array, ""]:  # ty: ignore[incompatible-property-override]
        """Updates so far."""
        return self.step


def clustered(
    inner: optax.GradientTransformation,
    bits: int = 4,
    *,
    every: int = 1,
    iterations: int = 2,
    preserve_zeros: bool = False,
    uses: Any = None,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Train with shared values: after `optax.apply_updates`, weights lie on `2 ** bits` centroids
    (exactly from the second step on, since the first starts from any numbers).

    `inner` moves dense weights that the state holds (gradients pass straight through the clusters); the
    parameters are their clusters. Every `every` steps Lloyd's iteration moves the centroids after them.
    `jp.cluster_tree(params, bits)` afterwards finds exactly these values. Updates are float32, or float64
    for float64 parameters, since narrower ones would miss the centroids; parameters keep their dtype.

    Args:
      inner: any optax transform.
      bits: 1 to 8.
      every: steps between two updates of centroids, at least 1; weights change clusters in every step.
      iterations: of Lloyd's algorithm at each.
      preserve_zeros: weights that are 0 at `init` stay exactly 0, and one centroid less serves the rest.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves; by default the weights: as `uses` says, else by shapes and names.

    Returns:
      A transform whose state is a `ClusteredState`.

    Raises:
      ValueError: numbers out of range; `params` missing (from `update`).
      TypeError: compressed leaves among those to cluster (from `init`).

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
    _checks.positive_int("iterations", iterations)
    inner = optax.with_extra_args_support(inner)
    clusters = 2**bits - preserve_zeros

    def init(params: Params) -> ClusteredState:
        if is_empty(params):  # a placeholder of `optax.tree.map_params`
            return ClusteredState(jnp.zeros((), jnp.int32), params, params, inner.init(params))
        for path, leaf, hit in zip(
            *_trees.flatten(params)[:2], _trees.select(params, where, uses=uses), strict=True
        ):
            if hit and is_compressed(leaf):
                raise TypeError(f"params: leaf {path!r} {cure(leaf)}")
        other = lambda _: jnp.zeros(())
        copy = lambda x: jnp.array(x, _wide(x), copy=True)
        start = lambda x: jax.jit(_started, static_argnums=(1, 2))(x, clusters, preserve_zeros)
        latent = _trees.map_selected(copy, other, params, where=where, uses=uses)
        centers = _trees.map_selected(start, other, params, where=where, uses=uses)
        return ClusteredState(jnp.zeros((), jnp.int32), latent, centers, inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ClusteredState]:
        params = required(params, "clustered")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        due = state.step % every == 0
        moved = lambda _, u, old: _moved(old, u, preserve_zeros) if old.ndim else old
        latent = _trees.map_with_path(moved, updates, state.latent)
        centers = jax.tree.map(
            lambda c, x: _recentred(c, x, due, iterations, preserve_zeros) if x.ndim else c,
            state.centers,
            latent,
        )
        out = _trees.map_with_path(
            lambda _, u, p, x, c: _clusters_of(x, c, p, preserve_zeros) if x.ndim else u,
            *(updates, params, latent, centers),
        )
        step = jnp.asarray(optax.safe_increment(state.step))
        return out, ClusteredState(step, latent, centers, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(x: Array) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _lloyd(
    latent: Float[Array, "..."], centers: Float[Array, "k"], iterations: int, zeros: bool
) -> Float[Array, "k"]:
    flat = latent.reshape(-1).astype(jnp.float32)
    weight = (flat != 0).astype(jnp.float32) if zeros else None
    return jax.lax.fori_loop(0, iterations, lambda _, c: line_turn(flat, c, weight), centers)


def _started(x: Float[Array, "..."], clusters: int, zeros: bool) -> Float[Array, "k"]:
    centers = line_start(x.reshape(-1).astype(jnp.float32), clusters)
    return _lloyd(x, centers, _START_ITERATIONS, zeros)


def _moved(
    latent: Float[Array, "*shape"], update: Float[Array, "*shape"], zeros: bool
) -> Float[Array, "*shape"]:
    found = latent + update.astype(latent.dtype)
    return jnp.where(latent == 0, 0.0, found) if zeros else found


def _recentred(
    centers: Float[Array, "k"], latent: Array, due: Array, iterations: int, zeros: bool
) -> Float[Array, "k"]:
    move = lambda c: _lloyd(latent, c, iterations, zeros)
    return jax.lax.cond(due, move, lambda c: c, centers)


def _clusters_of(
    latent: Float[Array, "*shape"], centers: Float[Array, "k"], param: Array, zeros: bool
) -> Float[Array, "*shape"]:
    """The update that takes a parameter to its centroids."""
    # differences of numbers on a grid of 23 bits are exact: parameters plus updates are centroids
    top = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(jnp.max(jnp.abs(centers)), 1e-30))))
    grid = top * 2.0**-22
    value = (jnp.round(centers / grid) * grid)[assigned(latent, centers).astype(jnp.int32)]
    value = jnp.where(latent == 0, 0.0, value) if zeros else value
    wide = _wide(param)
    return value.astype(param.dtype).astype(wide) - param.astype(wide)
