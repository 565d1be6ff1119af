"""The triangular factor of an inverse second moment, on which the solvers run."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@partial(jax.jit, static_argnames=("damping",))
def damped(
    gram: Float[Array, "features features"], *, damping: float
) -> Float[Array, "features features"]:
    """The gram with `damping` times its mean diagonal added; the identity where nothing was seen."""
    gram = 0.5 * (gram + gram.T)
    mean = jnp.mean(jnp.diagonal(gram))
    ridge = jnp.where(mean > 0, damping * mean, 1.0)
    return gram + ridge * jnp.eye(gram.shape[0], dtype=gram.dtype)


def inverse_factor(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Upper triangular `u` with `gram⁻¹ = uᵀ u`, by one Cholesky factorisation and one solve.

    With `j` the reversal of rows and columns, `j gram j = l lᵀ` makes `gram = r rᵀ` for the upper
    triangular `r = j l j`, and `u = r⁻¹`. The inverse itself, whose condition is the square of the
    factor's, is never formed, so that float32 suffices. NaN where the gram is not positive.
    """
    lower = jnp.linalg.cholesky(gram[::-1, ::-1])
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    # (j l j)⁻¹ = j l⁻¹ j
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)[::-1, ::-1]


def is_usable(factor: Float[Array, "n n"]) -> Bool[Array, ""]:
    """Whether the factorisation found a positive matrix."""
    return jnp.all(jnp.isfinite(factor))
