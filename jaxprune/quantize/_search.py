"""Scales of least squared error, found by trying ranges below the largest magnitude."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.quantize._scale import (
    Scale,
    Zero,
    from_levels,
    reciprocal,
    reduce_by,
    scale_of,
    to_levels,
)
from jaxprune.quantize._spec import Spec, fitted

SHRINKS = tuple(float(x) for x in np.linspace(1.0, 0.5, 26))
"""Fractions of the range that are tried."""


@partial(jax.jit, static_argnames=("spec", "shrinks"))
def least_squares_scale(
    x: Float[Array, "..."],
    spec: Spec,
    weights: Float[Array, "..."] | None = None,
    *,
    shrinks: tuple[float, ...] = SHRINKS,
) -> tuple[Scale, Zero | None]:
    """Scale and zero point that round with the least weighted squared error.

    `min_c Σ h (x - Q(x; c · scale))²` over fractions `c` of the range, for each scale of its own: what
    clipping a few large entries costs is weighed against a finer grid for the others.

    Args:
      x: an array, finite.
      spec: the format, resolved for it.
      weights: importance of entries, broadcastable against `x`; `None` for equal ones.
      shrinks: the fractions, the first of them 1.

    Returns:
      As `scale_of` has them. Ties go to the widest range.
    """
    spec = fitted(spec, "x", x.shape).spec or spec
    base, zero = scale_of(x, spec)
    x = x.astype(base.dtype)
    each = jnp.ones((), x.dtype) if weights is None else weights.astype(x.dtype)

    def cost(c: Array) -> Scale:
        scale = base * c
        y = from_levels(
            to_levels(x, reciprocal(scale), zero, spec), scale, zero, spec, jnp.dtype(x.dtype)
        )
        return reduce_by(jnp.sum, jnp.broadcast_to(each, x.shape) * jnp.square(x - y), spec)

    def better(best: tuple[Scale, Scale], c: Array) -> tuple[tuple[Scale, Scale], None]:
        least, factor = best
        now = cost(c)
        return (jnp.minimum(least, now), jnp.where(now < least, c, factor)), None

    first = jnp.asarray(shrinks[0], base.dtype)
    start = cost(first), jnp.full(base.shape, first)
    (_, factor), _ = jax.lax.scan(better, start, jnp.asarray(shrinks[1:], base.dtype))
    return base * factor, zero
