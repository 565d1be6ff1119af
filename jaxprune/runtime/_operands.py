"""Scales and parts of products, laid out beside operands and results in the standard order.

Operands are (batch…, rows, contracted…), results (batch…, rows, free…), see `jaxprune.program.Layout`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.program import Layout
from jaxprune.runtime._activations import STEPS


def contracted(x: Array, layout: Layout) -> tuple[int, ...]:
    return tuple(range(x.ndim - len(layout.contract), x.ndim))


def beside(scale: Array, layout: Layout) -> Array:
    """A scale of some free and batch axes, as stored, beside (batch…, rows, free…)."""
    kept = (*layout.batch, *layout.free)
    scale = jnp.transpose(scale, (*kept, *layout.contract))
    return jnp.expand_dims(scale.reshape(scale.shape[: len(kept)]), len(layout.batch))


def over_free(scale: Array, layout: Layout) -> Array:
    """A scale of each row, (batch…, rows, 1…), or of all, beside (batch…, rows, free…)."""
    if scale.ndim == 0:
        return scale
    return scale.reshape(*scale.shape[: len(layout.batch) + 1], *(1 for _ in layout.free))


def times_inner(x: Array, scale: Array | None, layout: Layout) -> Array:
    """`x` times a scale of some contracted axes, as stored."""
    if scale is None:
        return x
    kept = len(layout.batch) + len(layout.free)
    scale = jnp.transpose(scale, (*layout.batch, *layout.free, *layout.contract))
    return x * scale.reshape(scale.shape[kept:])


def sum_of_parts(ys: list[Array], axis: int) -> Array:
    """The high part, and the low one in its smaller unit; the axis of parts stays."""
    parts = [
        jax.lax.slice_in_dim(y, i, i + 1, axis=axis).astype(jnp.float32)
        for y in ys
        for i in range(y.shape[axis])
    ]
    return parts[0] + parts[1] / STEPS if len(parts) > 1 else parts[0]


def added(ys: list[Array], n_batch: int, rows: int) -> Array:
    """Parts added, and padding cut: (batch…, parts, rows, free…) to (batch…, rows, free…)."""
    ys = [jax.lax.slice_in_dim(y, 0, rows, axis=n_batch + 1) for y in ys]
    return jax.lax.squeeze(sum_of_parts(ys, n_batch), (n_batch,))
