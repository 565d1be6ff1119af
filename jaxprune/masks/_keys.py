"""Thresholds that can be counted, and exact counts of entries to keep.

A search needs thresholds between which the gaps are countable, so it runs over integer *keys* in the
order of the floats: `key(x) < key(y)` exactly where `x < y`, with neighbouring floats one apart and
both zeros at 0. Only thresholds are ever mapped, a handful of numbers; the scores themselves are
compared as they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune import _checks


def floating_dtype(leaves: list[Array]) -> jnp.dtype:
    """The dtype that scores are compared in: float32, or float64 where any leaf is."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in leaves) else jnp.float32)


def key_range(dtype: jnp.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The keys just below `-inf` and of `+inf`, as NumPy integers as wide as `dtype`."""
    top = np.asarray(np.inf, dtype).view(_integer(dtype))
    return np.asarray(-top - 1), top


def from_key(keys: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The floats of int32 or int64 keys within `key_range`."""
    bits = jnp.where(keys < 0, jnp.iinfo(keys.dtype).min - keys, keys)
    return jax.lax.bitcast_convert_type(
        bits, jnp.float64 if keys.dtype == jnp.int64 else jnp.float32
    )


def _integer(dtype: jnp.dtype) -> type:
    return np.int64 if dtype == jnp.float64 else np.int32


def kept(sparsity: float | Array, size: int) -> Int[Array, ""] | int:
    """`round((1 - sparsity) * size)`, half to even, exact also for a traced sparsity.

    A traced float32 sparsity counts in units of 2^-24; the product is formed in base 2^12 digits,
    since neither float32 nor int32 holds it.

    Args:
      sparsity: scalar in [0, 1], a Python number or an array; values outside are clipped.
      size: entries in all, below 2^31.

    Returns:
      A Python int for a concrete sparsity, an int32 scalar for a traced one.
    """
    if not _checks.is_traced(sparsity):
        return round((1 - float(np.asarray(sparsity))) * size)
    density = jnp.clip(1.0 - jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)
    units = jnp.round(density * 2.0**24).astype(jnp.uint32)  # in [0, 2^24]
    high, low = units >> 12, units & 0xFFF
    s0, s1, s2 = (jnp.uint32(size >> shift & 0xFFF) for shift in (0, 12, 24))
    d0 = low * s0
    d1 = low * s1 + high * s0 + (d0 >> 12)
    d2 = low * s2 + high * s1 + (d1 >> 12)
    rest = (d1 & 0xFFF) << 12 | (d0 & 0xFFF)  # the part below one entry, in units of 2^-24
    whole = d2 + ((high * s2) << 12)
    half = jnp.uint32(1 << 23)
    up = (rest > half) | ((rest == half) & (whole & 1 == 1))
    return (whole + up.astype(jnp.uint32)).astype(jnp.int32)
