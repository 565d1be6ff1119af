"""Values that are computed once, however many read them.

The compiler for CPU fuses what leads to a value (a GELU, a rounding) into every reader, computing it as
often. It drops optimization barriers early; it cannot look through a loop, even one that never runs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._trees import is_few

_LARGE = 2**18  # entries worth keeping from being computed again
_A_NAN = 0x7FC12345  # no computation makes this very NaN


def barrier(x: jax.Array) -> jax.Array:
    """`x`, floats, computed before it is used, as before and after a dense product."""
    return x if is_few(x.size, _LARGE - 1) else barrier_all((x,), x)[0]


def barrier_all(xs: Any, witness: jax.Array) -> Any:
    """A tree of arrays, computed before they are used; `witness`: any float32 array."""
    first = jax.lax.bitcast_convert_type(witness.reshape(-1)[0].astype(jnp.float32), jnp.uint32)
    never = (first == _A_NAN).astype(jnp.int32)
    step = lambda carry: (
        carry[0] + 1,
        jax.tree.map(lambda x: x + jnp.ones((), x.dtype), carry[1]),
    )
    return jax.lax.while_loop(lambda carry: carry[0] < never, step, (jnp.int32(0), xs))[1]
