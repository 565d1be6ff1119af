"""Hard-concrete gates: exactly 0 or 1 with some chance, and a gradient between.

A gate is `clip(s (zeta - gamma) + gamma, 0, 1)` with `s = sigmoid((logit(u) + log_alpha) / beta)`, u
uniform.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks


def _check(beta: Any, gamma: float, zeta: float) -> None:
    _checks.positive("beta", beta)
    if not gamma < 0 < 1 < zeta:
        raise ValueError(
            f"gamma, zeta: expected gamma below 0 and zeta above 1, so that 0 and 1 have chances, "
            f"got {gamma} and {zeta}"
        )


def hard_concrete(
    log_alpha: Float[Array, "..."],
    key: jax.Array,
    *,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> Float[Array, "..."]:
    """Gates drawn from the hard-concrete distribution; gradients flow to `log_alpha`.

    Args:
      log_alpha: location; large opens.
      key: a PRNG key.
      beta: temperature, above 0.
      gamma, zeta: the interval that is clipped to [0, 1].

    Returns:
      Numbers in [0, 1] in the shape of `log_alpha`.

    Raises:
      ValueError: a temperature not above 0, an interval that does not contain [0, 1] inside.

    Example:
      >>> gates = jp.gates.hard_concrete(jnp.zeros(2000), jax.random.key(0))
      >>> bool((gates == 0).any()), bool((gates == 1).any()), abs(round(float(gates.mean()) - 0.5, 1))
      (True, True, 0.0)

    Reference: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
    https://arxiv.org/abs/1712.01312
    """
    _check(beta, gamma, zeta)
    log_alpha = jnp.asarray(log_alpha)
    noise = jax.random.logistic(
        key, log_alpha.shape, jnp.promote_types(log_alpha.dtype, jnp.float32)
    )
    s = jax.nn.sigmoid((noise + log_alpha) / beta)
    return jnp.clip(s * (zeta - gamma) + gamma, 0.0, 1.0).astype(log_alpha.dtype)


def hard_concrete_mean(
    log_alpha: Float[Array, "..."], *, gamma: float = -0.1, zeta: float = 1.1
) -> Float[Array, "..."]:
    """The gate for inference: `clip(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1)`.

    Args:
      log_alpha: location.
      gamma, zeta: the interval that is clipped to [0, 1].

    Returns:
      Numbers in [0, 1].

    Raises:
      ValueError: an interval that does not contain [0, 1] inside.

    Example:
      >>> jp.gates.hard_concrete_mean(jnp.array([-5.0, 0.0, 5.0])).tolist()
      [0.0, 0.5, 1.0]

    Reference: Louizos et al., 2018, https://arxiv.org/abs/1712.01312, equation 13
    """
    _check(1.0, gamma, zeta)
    return jnp.clip(jax.nn.sigmoid(jnp.asarray(log_alpha)) * (zeta - gamma) + gamma, 0.0, 1.0)


def expected_l0(
    log_alpha: Float[Array, "..."],
    *,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> Float[Array, "..."]:
    """The chance that a hard-concrete gate is not 0: `sigmoid(log_alpha - beta log(-gamma / zeta))`.

    Args:
      log_alpha: location.
      beta: temperature, above 0.
      gamma, zeta: the interval that is clipped to [0, 1].

    Returns:
      Chances in the shape of `log_alpha`; their sum is the expected number of open gates.

    Raises:
      ValueError: a temperature not above 0, an interval that does not contain [0, 1] inside.

    Example:
      >>> round(float(jp.gates.expected_l0(jnp.array(0.0))), 4)
      0.8318

    Reference: Louizos et al., 2018, https://arxiv.org/abs/1712.01312, equation 12
    """
    _check(beta, gamma, zeta)
    return jax.nn.sigmoid(jnp.asarray(log_alpha) - beta * math.log(-gamma / zeta))
