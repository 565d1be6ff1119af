"""Random keys in states."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def as_data(key: jax.Array) -> tuple[Callable[[], Array], Callable[[Array], jax.Array]]:
    """A key as plain integers, which every checkpoint takes, and back."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return lambda: jnp.array(key, copy=True), lambda data: data
    impl = jax.random.key_impl(key)
    return (
        lambda: jnp.array(jax.random.key_data(key), copy=True),
        lambda data: jax.random.wrap_key_data(data, impl=impl),
    )
