"""Gated layers as functions of their parameters: what the Flax modules of `jp.linen` and `jp.nnx`
share.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune.gates._binary import (
    gumbel_sigmoid,
    saliency,
    semantic_hashing,
    straight_through,
    top_k,
)
from jaxprune.gates._concrete import hard_concrete, hard_concrete_mean
from jaxprune.gates._reinforce import bernoulli

METHODS = (
    "top_k",
    "straight_through",
    "gumbel",
    "semantic_hashing",
    "hard_concrete",
    "bernoulli",
)
RANDOM = ("gumbel", "semantic_hashing", "hard_concrete", "bernoulli")
_LEAST = 4  # neurons of a bottleneck


def bottleneck(channels: int, reduction: int) -> int:
    """Neurons between pooling and logits: few, but never none.

    Args:
      channels: read.
      reduction: wanted ratio, at least 1.

    Returns:
      `max(channels // reduction, min(channels, 4))`.

    Raises:
      ValueError: sizes below 1.

    Example:
      >>> jp.gates.bottleneck(128, 16), jp.gates.bottleneck(3, 16)
      (8, 3)
    """
    _checks.positive_int("channels", channels)
    _checks.positive_int("reduction", reduction)
    return max(channels // reduction, min(channels, _LEAST))


def kept(rate: Any, n: int) -> int:
    """How many of n gates stay open, of a number or a fraction."""
    if isinstance(rate, float):
        if not 0 < rate <= 1:
            raise ValueError(f"k: expected a number of gates, or a fraction in (0, 1], got {rate}")
        return max(round(rate * n), 1)
    _checks.positive_int("k", rate)
    if rate > n:
        raise ValueError(f"k: {rate} is more than the {n} gates")
    return rate


def opened(
    logits: Float[Array, "... n"],
    method: str,
    *,
    k: int | float = 0.5,
    key: jax.Array | None = None,
    temperature: Any = 1.0,
) -> Float[Array, "... n"]:
    """Gates of logits, by method: random where a key is given, else as in inference.

    Args:
      logits: of gates.
      method: `"top_k"` (saliencies of the winners), `"straight_through"`, `"gumbel"`,
        `"semantic_hashing"`, `"hard_concrete"`, or `"bernoulli"` (0 or 1 without a gradient, for
        policies trained by `reinforce`).
      k: of `"top_k"`: how many stay, or which fraction.
      key: a PRNG key, for training of the random ones.
      temperature: of the random ones, above 0.

    Returns:
      Gates in the shape of `logits`.

    Raises:
      ValueError: an unknown method, numbers out of range.

    Example:
      >>> jp.gates.opened(jnp.array([3.0, -1.0, 2.0]), "straight_through").tolist()
      [1.0, 0.0, 1.0]
    """
    _checks.choice("method", method, METHODS)
    if method == "top_k":
        return top_k(saliency(logits), kept(k, logits.shape[-1]))
    if method == "hard_concrete" and key is None:
        return hard_concrete_mean(logits)
    if method == "straight_through" or key is None:
        return straight_through(logits)
    if method == "hard_concrete":
        return hard_concrete(logits, key, beta=temperature * 2 / 3)
    if method == "gumbel":
        return gumbel_sigmoid(logits, key, temperature=temperature)
    return semantic_hashing(logits, key) if method == "semantic_hashing" else bernoulli(logits, key)


def pooled(x: Float[Array, "batch ... channels"], *, magnitude: bool = True) -> Array:
    """The mean (of magnitudes) over all axes between the first and the last.

    Args:
      x: (batch, any spatial axes or none, channels).
      magnitude: of magnitudes, as feature boosting and suppression has it.

    Returns:
      (batch, channels).

    Raises:
      ValueError: fewer than two axes.

    Example:
      >>> jp.gates.pooled(jnp.array([[[1.0], [-3.0]]])).tolist()
      [[2.0]]
    """
    if x.ndim < 2:
        raise ValueError(f"x: expected (batch, …, channels), got shape {x.shape}")
    x = jnp.abs(x) if magnitude else x
    return jnp.mean(x, tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def gate_logits(params: Any, x: Float[Array, "batch ... channels"]) -> Float[Array, "batch n"]:
    """Logits of channel gates: pooling, standardised channels, a bottleneck with a ReLU, a product.

    What is pooled has mean 0 and deviation 1 over the channels of each example, so that gates do not
    depend on the scale of activations.

    Args:
      params: `{"reduce": {"kernel", "bias"}, "expand": {"kernel", "bias"}}`.
      x: what the gated layer reads.

    Returns:
      (batch, gates).

    Example:
      >>> params = jp.gates.gate_params(jax.random.key(0), 8, 16)
      >>> jp.gates.gate_logits(params, jnp.ones((2, 5, 5, 8))).shape
      (2, 16)
    """
    y = jax.nn.standardize(pooled(x), axis=-1)
    y = jax.nn.relu(y @ params["reduce"]["kernel"] + params["reduce"]["bias"])
    return y @ params["expand"]["kernel"] + params["expand"]["bias"]


def gate_params(
    key: jax.Array, channels: int, gates: int, *, reduction: int = 16, bias: float = 1.0
) -> Any:
    """Parameters for `gate_logits`, all gates open at first.

    Args:
      key: a PRNG key.
      channels: that the gate reads.
      gates: that it opens.
      reduction: of the bottleneck.
      bias: of the logits at the start.

    Returns:
      A tree.

    Raises:
      ValueError: sizes below 1.

    Example:
      >>> jp.gates.gate_params(jax.random.key(0), 32, 64)["reduce"]["kernel"].shape
      (32, 4)
    """
    middle = bottleneck(channels, reduction)
    _checks.positive_int("gates", gates)
    one, two = jax.random.split(key)
    normal = lambda k, m, n: jax.random.normal(k, (m, n)) * (2.0 / m) ** 0.5
    return {
        "reduce": {"kernel": normal(one, channels, middle), "bias": jnp.zeros(middle)},
        "expand": {"kernel": 0.3 * normal(two, middle, gates), "bias": jnp.full(gates, bias)},
    }


def beside(gates: Float[Array, "batch n"], x: Any) -> Array:
    """Gates of channels, to multiply with (batch, …, n)."""
    return gates.reshape(gates.shape[0], *(1 for _ in x.shape[1:-1]), gates.shape[-1]).astype(
        x.dtype
    )
