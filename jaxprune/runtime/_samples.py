"""What some entries of the weights tell of all: enough to see outliers, as a product runs."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.program import Layout
from jaxprune.runtime._activations import LEAST, STEPS
from jaxprune.runtime._operands import beside

_SEEN = 16  # entries of each block and column


def sampled(codes: Sequence[Array], inner: Layout, of: Callable[[Array], Array]) -> Array:
    """Some codes of each column, high and low parts: the sum of something over them, how many are not 0,
    and how many they are: (batch…, 1, 3, free…).
    """
    axis = max(inner.contract, key=lambda i: inner.shape[i])
    step = max(codes[0].shape[axis] // _SEEN, 1)
    parts = [jax.lax.slice_in_dim(y, 0, None, step, axis).astype(jnp.float32) for y in codes]
    some = parts[0] if len(parts) == 1 else parts[0] + parts[1] / STEPS
    sums = [jnp.sum(y, inner.contract) for y in (of(some), some != 0, jnp.ones_like(some))]
    kept = [i for i in range(some.ndim) if i not in inner.contract]
    order = [kept.index(i) for i in (*inner.batch, *inner.free)]
    at = len(inner.batch)
    found = [jnp.transpose(y.astype(jnp.float32), order) for y in sums]
    return jnp.expand_dims(jnp.stack(found, at), at)


def mean_squares(seen: Array, layout: Layout) -> Array:
    """The mean square of each column's codes, summed over columns, on average over batch axes."""
    at = len(layout.batch)
    squares, _, count = jnp.moveaxis(jnp.squeeze(seen, at), at, 0)
    return jnp.sum(squares / jnp.maximum(count, 1.0)) / math.prod(squares.shape[:at])


def weights_resolved(seen: Array, bound: Array, layout: Layout) -> Array:
    """Whether the largest bound of a column is below what is typical of all of them."""
    at = len(layout.batch)
    above, count, _ = jnp.moveaxis(jnp.squeeze(seen, at), at, 0)
    bound = jnp.broadcast_to(jnp.squeeze(beside(bound, layout), at), above.shape)
    typical = bound * jnp.where(count > 0, 1.0 + above / (LEAST * jnp.maximum(count, 1.0)), 0.0)
    return jnp.max(bound, initial=0.0) <= jnp.sqrt(jnp.mean(jnp.square(typical)))
