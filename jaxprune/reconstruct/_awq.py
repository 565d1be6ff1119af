"""Activation-aware weight quantization: inputs that are large get finer weights (AWQ)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune._types import Params, PyTree, Where
from jaxprune.quantize import (
    InputScaledArray,
    Rules,
    Spec,
    from_levels,
    least_squares_scale,
    quantize_with,
    reciprocal,
    scale_of,
    to_levels,
)
from jaxprune.reconstruct._leaf_by_leaf import Seen, format_of, leaf_by_leaf, planned
from jaxprune.reconstruct._matrices import Layout, grams


def awq(
    params: Params,
    stats: PyTree,
    bits: int | None = None,
    *,
    group_size: int | None = 128,
    otherwise: str = "auto",
    symmetric: bool = True,
    dtype: Any = None,
    steps: int = 20,
    clip: bool = True,
    rules: Rules | None = None,
    where: Where = None,
) -> PyTree:
    """AWQ: activation-aware weight quantization, features that carry much are rounded more finely.

    Per matrix, with factors `s = rms(x)^a` of its input features, `Q(s W) / s` is computed for exponents
    `a` in [0, 1), and the one of least output error `tr(Dᵀ H D)`, `D = Q(s W) / s - W`, is kept. The
    factors stay beside the codes, one number for each input feature, and products multiply their inputs
    by them: no layer before needs to take them. Convolutions have factors for channels, not for places of
    the window; grouped ones none.

    Args:
      params: any tree of arrays.
      stats: of `jp.calibrate(fn, params, batches)`; with `second_moment=True` errors are those of the
        outputs, else feature by feature.
      bits: 8, 4 or 2; 4 where neither it nor `dtype` is given.
      group_size, otherwise, symmetric, dtype, rules: as in `jp.quantize_tree`. Leaves that a rule names
        and nothing was seen to multiply (embeddings) are rounded to nearest.
      steps: how many exponents are tried.
      clip: whether scales then have the least squared error, weighted by the inputs' squares, instead of
        reaching the largest magnitude.
      where: which leaves; by default those that were seen to multiply something.

    Returns:
      The tree with `jp.quantize.InputScaledArray` leaves, `QuantizedArray` where factors do not help.

    Raises:
      ValueError: statistics of another tree, a leaf named by `where` that nothing multiplied, NaN or
        infinity, a group size that does not divide a leaf where `otherwise="error"`.

    Warns:
      UserWarning: matrices (experts) that no row was seen to multiply, which have no factors; leaves that
        groups do not divide.

    Example:
      >>> params = {"w": jax.random.normal(jax.random.key(0), (32, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (64, 32)).at[:, 3].mul(20)
      >>> fn = lambda p, x: x @ p["w"]
      >>> stats = jp.calibrate(fn, params, [x], second_moment=True)
      >>> near, aware = (jp.compressed(fn)(tree, x) - fn(params, x) for tree in (
      ...     jp.quantize_tree(params, 4), jp.awq(params, stats, 4, group_size=None)))
      >>> bool(jnp.linalg.norm(aware) < 0.7 * jnp.linalg.norm(near))
      True

    Reference: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration", 2023, https://arxiv.org/abs/2306.00978
    """
    _checks.positive_int("steps", steps)
    given = {"group_size": group_size, "otherwise": otherwise, "symmetric": symmetric}
    plan = planned(params, stats, format_of(bits, dtype, **given), rules, where, "awq")
    return leaf_by_leaf(
        plan, "rounded without factors", lambda x, leaf: _aware(x, leaf, steps, clip)
    )


def _aware(x: Array, leaf: Seen, steps: int, clip: bool) -> Any:
    """One leaf."""
    stat, layout, spec = leaf.stat, leaf.layout, leaf.spec
    n = layout.features
    squares = stat.mean_square.astype(jnp.float32).reshape(layout.matrices, n)
    gram = None if stat.second_moment is None else grams(stat, layout)
    wide = x.astype(jnp.float32)
    factors = jnp.ones((layout.matrices, n, 1))
    if layout.groups == 1:
        size = _sizes(squares, layout, is_window=stat.uses.kind == "convolution")
        powers = jnp.asarray(np.arange(steps) / steps, jnp.float32)
        factors = _best(wide, size, squares, gram, powers, layout=layout, spec=spec)
    beside = join_factors(factors, layout)
    scaled = wide * beside
    if clip:
        weights = (squares[..., None] + 1e-3 * jnp.mean(squares, -1)[:, None, None]) / factors**2
        weights = jnp.where(jnp.any(weights > 0, (-2, -1), keepdims=True), weights, 1.0)
        full = layout.join(jnp.broadcast_to(weights, (*weights.shape[:2], layout.outputs)))
        known = least_squares_scale(scaled, spec, full)
    else:
        known = scale_of(scaled, spec)
    codes = quantize_with(scaled, *known, spec).astype(x.dtype)
    plain = bool(jnp.all(factors == 1.0))
    return codes if plain else InputScaledArray(codes, 1.0 / beside)


def _sizes(
    squares: Float[Array, "matrices features"], layout: Layout, *, is_window: bool
) -> Float[Array, "matrices features"]:
    """The rms of each feature, of convolutions of each channel, about 1."""
    if is_window:  # places of a window share the factor of their channel
        own = squares.reshape(len(squares), -1, layout.shape[layout.summed[-1]])
        squares = jnp.broadcast_to(jnp.mean(own, 1, keepdims=True), own.shape).reshape(
            squares.shape
        )
    size = jnp.sqrt(squares)
    least = 1e-4 * jnp.max(size, -1, keepdims=True)
    size = jnp.maximum(size, jnp.where(least > 0, least, 1.0))
    middle = jnp.sqrt(jnp.max(size, -1, keepdims=True) * jnp.min(size, -1, keepdims=True))
    return size / middle


def join_factors(
    factors: Float[Array, "matrices features one"], layout: Layout
) -> Float[Array, "..."]:
    """A factor for each feature, in the leaf's layout, with axes of size 1 for outputs."""
    if layout.groups > 1:
        return layout.join(jnp.broadcast_to(factors, (*factors.shape[:2], layout.outputs)))
    sizes = [layout.shape[i] for i in (*range(layout.lead), *layout.summed)]
    return layout.restored(factors.reshape(*sizes, *(1 for _ in layout.outer)))


@partial(jax.jit, static_argnames=("layout", "spec"))
def _best(
    w: Float[Array, "..."],
    size: Float[Array, "matrices features"],
    squares: Float[Array, "matrices features"],
    gram: Float[Array, "matrices features features"] | None,
    powers: Float[Array, "steps"],
    *,
    layout: Layout,
    spec: Spec,
) -> Float[Array, "matrices features one"]:
    """The factors of least output error, matrix by matrix."""

    def loss(factors: Array) -> Array:
        beside = join_factors(factors, layout)
        scaled = w * beside
        scale, zero = scale_of(scaled, spec)
        levels = to_levels(scaled, reciprocal(scale), zero, spec)
        lost = from_levels(levels, scale, zero, spec, jnp.dtype("float32")) / beside - w
        lost = layout.split(lost)
        if gram is None:
            return jnp.sum(jnp.square(lost) * squares[..., None], (-2, -1))
        return jnp.sum((gram @ lost) * lost, (-2, -1))

    def better(best: tuple[Array, Array], power: Array) -> tuple[tuple[Array, Array], None]:
        least, kept = best
        factors = (size**power)[..., None]
        now = loss(factors)
        wins = now < least
        return (jnp.where(wins, now, least), jnp.where(wins[:, None, None], factors, kept)), None

    first = jnp.ones((*size.shape, 1))
    (_, found), _ = jax.lax.scan(better, (loss(first), first), powers[1:])
    return found
