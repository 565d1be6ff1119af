"""So many of the smallest entries of an array, exactly; traceable counts, under `vmap` and loops."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def smallest(scores: Float[Array, "..."], count: Int[Array, ""]) -> Bool[Array, "..."]:
    """True for the `count` smallest of scores >= 0, ties to the earliest.

    Nonnegative floats are ordered as their bits are, so the threshold is found by halving a range of
    integers: thirty passes that vectorise, where a sort would take many times longer.
    """
    flat = scores.astype(jnp.float32).reshape(-1)
    keys = jax.lax.bitcast_convert_type(flat, jnp.int32)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # fewer than count at or below low, at least count at or below high
        middle = low + (high - low) // 2
        enough = jnp.sum(keys <= middle) >= count
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    ends = jnp.array(-1, jnp.int32), jnp.array(0x7F800000, jnp.int32)
    level = jax.lax.fori_loop(0, 31, halve, ends)[1]
    below, ties = keys < level, keys == level
    more = count - jnp.sum(below)
    found = (below | (ties & (jnp.cumsum(ties) <= more))) & (count > 0)
    return found.reshape(scores.shape)
