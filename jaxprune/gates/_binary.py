"""Gates that are 0 or 1, with gradients that work.

A gate opens where its logit is above 0. `(logits > 0)` itself has no gradient anywhere: a network
trained through it never learns which gates to open. Each function here says what its gradient is instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks


def straight_through(
    x: Float[Array, "..."], *, threshold: float = 0.0, surrogate: str = "sigmoid"
) -> Float[Array, "..."]:
    """1 where `x > threshold`, else 0; its gradient is that of a soft gate.

    Args:
      x: logits.
      threshold: above which gates open.
      surrogate: the gradient: `"sigmoid"` (of the sigmoid), `"identity"` (1), or `"clipped"` (1 within
        1 of the threshold, else 0).

    Returns:
      0 or 1, in the shape and dtype of `x`.

    Raises:
      ValueError: an unknown surrogate.

    Example:
      >>> x = jnp.array([-1.0, 0.5])
      >>> jp.gates.straight_through(x).tolist()
      [0.0, 1.0]
      >>> naive = jax.grad(lambda x: jnp.sum((x > 0) * 1.0))(x)  # kills the gradient
      >>> ours = jax.grad(lambda x: jnp.sum(jp.gates.straight_through(x)))(x)
      >>> naive.tolist(), bool((ours > 0).all())
      ([0.0, 0.0], True)

    Reference: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013,
    https://arxiv.org/abs/1308.3432
    """
    _checks.choice("surrogate", surrogate, ("sigmoid", "identity", "clipped"))
    x = jnp.asarray(x)
    soft = {
        "sigmoid": lambda: jax.nn.sigmoid(x - threshold),
        "identity": lambda: x,
        "clipped": lambda: jnp.clip(x, threshold - 1, threshold + 1),
    }[surrogate]()
    return _forward((x > threshold).astype(x.dtype), soft)


def _forward(value: Array, soft: Array) -> Array:
    """A value, with the gradient of another."""
    return soft + jax.lax.stop_gradient(value - soft)


def gumbel_sigmoid(
    logits: Float[Array, "..."],
    key: jax.Array,
    *,
    temperature: Any = 1.0,
    hard: bool = True,
) -> Float[Array, "..."]:
    """A gate drawn from `Bernoulli(sigmoid(logits))`, relaxed: `sigmoid((logits + noise) / T)`.

    Args:
      logits: of gates.
      key: a PRNG key.
      temperature: T, above 0; lower is closer to 0 and 1 (a schedule's value may be traced).
      hard: round the draw, with the gradient of the soft one.

    Returns:
      0 or 1, or numbers between.

    Raises:
      ValueError: a temperature that is not above 0.

    Example:
      >>> gates = jp.gates.gumbel_sigmoid(jnp.full(1000, 1.0), jax.random.key(0))
      >>> abs(round(float(gates.mean()) - 0.731, 1))
      0.0

    References: Jang et al., 2016, https://arxiv.org/abs/1611.01144; Maddison et al., 2016,
    https://arxiv.org/abs/1611.00712 (concrete)
    """
    _checks.positive("temperature", temperature)
    logits = jnp.asarray(logits)
    noise = jax.random.logistic(key, logits.shape, jnp.promote_types(logits.dtype, jnp.float32))
    soft = jax.nn.sigmoid((logits + noise) / temperature).astype(logits.dtype)
    return _forward((soft > 0.5).astype(soft.dtype), soft) if hard else soft


def semantic_hashing(
    logits: Float[Array, "..."],
    key: jax.Array | None,
    *,
    noise: float = 1.0,
) -> Float[Array, "..."]:
    """Improved semantic hashing: in half of the draws a saturating sigmoid, in the other half 0 or 1.

    With Gaussian noise on the logits; the gradient is always that of the saturating sigmoid
    `clip(1.2 sigmoid(x) - 0.1, 0, 1)`. Each example (entry of the first axis) draws its half.

    Args:
      logits: of gates.
      key: a PRNG key, or `None` for inference: 0 or 1, no noise.
      noise: its standard deviation, at least 0.

    Returns:
      Numbers in [0, 1].

    Raises:
      ValueError: noise below 0.

    Example:
      >>> jp.gates.semantic_hashing(jnp.array([-2.0, 3.0]), None).tolist()
      [0.0, 1.0]

    Reference: Kaiser & Bengio, "Discrete Autoencoders for Sequence Models", 2018,
    https://arxiv.org/abs/1801.09797; Chen et al., GaterNet, 2018, https://arxiv.org/abs/1811.11205
    """
    if noise < 0:
        raise ValueError(f"noise: expected at least 0, got {noise}")
    logits = jnp.asarray(logits)
    if key is None:
        return (logits > 0).astype(logits.dtype)
    first, second = jax.random.split(key)
    x = logits + noise * jax.random.normal(first, logits.shape, logits.dtype)
    soft = jnp.clip(1.2 * jax.nn.sigmoid(x) - 0.1, 0.0, 1.0)
    hard = _forward((x > 0).astype(x.dtype), soft)
    shape = (*logits.shape[:1], *(1 for _ in logits.shape[1:]))
    return jnp.where(jax.random.bernoulli(second, 0.5, shape), hard, soft)


def top_k(x: Float[Array, "... n"], k: int, *, soft: bool = True) -> Float[Array, "... n"]:
    """The k largest entries of the last axis stay, the others become 0: winners take all.

    Ties go to the earlier entry, so that exactly k stay.

    Args:
      x: saliencies.
      k: how many stay, 1 to all.
      soft: keep the values (feature boosting and suppression); else 1, with a straight-through gradient
        to the winners.

    Returns:
      The shape and dtype of `x`.

    Raises:
      ValueError: k out of range.

    Example:
      >>> jp.gates.top_k(jnp.array([3.0, 1.0, 2.0]), 2).tolist()
      [3.0, 0.0, 2.0]

    Reference: Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", 2018,
    https://arxiv.org/abs/1810.05331
    """
    x = jnp.asarray(x)
    check_k(k, x.shape[-1] if x.ndim else 0, "the last axis")
    kept = winners(x, k)
    if soft:
        return jnp.where(kept, x, 0)
    return jnp.where(kept, _forward(jnp.ones_like(x), x), 0)


def check_k(k: Any, n: int, what: str) -> None:
    """Checks that k lies within 1 and the size of an axis."""
    _checks.positive_int("k", k)
    if k > n:
        raise ValueError(f"k: {k} is more than the {n} entries of {what}")


def winners(x: Array, k: int) -> Array:
    """Which entries of the last axis are among the k largest; of ties, the earlier ones."""
    index = jax.lax.top_k(x, k)[1]
    return jax.nn.one_hot(index, x.shape[-1], dtype=bool).any(-2)


def saliency(x: Float[Array, "..."], *, beta: float = 1.0) -> Float[Array, "..."]:
    """A saliency that is never negative: `softplus(beta x) / beta`.

    Args:
      x: logits.
      beta: sharpness, above 0; large ones approach a ReLU.

    Returns:
      Positive numbers in the shape of `x`.

    Raises:
      ValueError: a sharpness not above 0.

    Example:
      >>> round(float(jp.gates.saliency(jnp.array(0.0))), 4)
      0.6931
    """
    _checks.positive("beta", beta)
    return jax.nn.softplus(beta * jnp.asarray(x)) / beta
