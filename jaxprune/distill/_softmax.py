"""What losses on logits share: softened distributions, divergences, labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxprune import _checks
from jaxprune.distill._reduce import counted, only, same_classes, wide


def ready(
    s: Any, t: Any, temperature: Any, axis: int, where: Any = None
) -> tuple[Array, Array, Array | float, Any]:
    """Wide logits without what `where` leaves out, temperatures, and the mask in the values' shape.

    Raises:
      ValueError: shapes, a temperature or a mask that do not fit.
    """
    same_classes(s, t, axis)
    shape = without(s.shape, axis)
    keep = counted(where, shape)
    temperature = temperatures(temperature, shape, keep)
    s, t = only(None if keep is None else jnp.expand_dims(keep, axis), *wide(s, t))
    return s, t, temperature, keep


def without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape without one of its axes."""
    return tuple(n for i, n in enumerate(shape) if i != axis % len(shape))


def temperatures(temperature: Any, shape: tuple[int, ...], keep: Any = None) -> Array | float:
    """A scalar, or one temperature for each example; 1 for those that do not count."""
    if jnp.ndim(temperature) == 0:
        _checks.positive("temperature", temperature)
        return temperature
    try:
        temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), shape)
    except ValueError:
        raise ValueError(
            f"temperature: shape {jnp.shape(temperature)}, expected a scalar, or one per example: {shape}"
        ) from None
    (temperature,) = only(keep, temperature, fill=1.0)
    if not _checks.is_traced(temperature):
        least = np.min(temperature, initial=1.0)
        if not (np.isfinite(temperature).all() and least > 0):
            raise ValueError(f"temperature: expected finite numbers above 0, got {least}")
    return temperature


def scalar(temperature: Any) -> None:
    """Checks the temperature of a loss between examples, which cannot have one for each."""
    if jnp.ndim(temperature):
        raise ValueError(
            f"temperature: expected a scalar, got shape {jnp.shape(temperature)}: this loss compares "
            "examples with each other"
        )


def log_softmax(x: Array, temperature: Any, axis: int) -> Array:
    """Log-probabilities of softened logits."""
    return jax.nn.log_softmax(softened(x, temperature, axis), axis)


def softened(x: Array, temperature: Any, axis: int) -> Array:
    """Logits over their temperature, one for all or one per example."""
    return x / (jnp.expand_dims(temperature, axis) if jnp.ndim(temperature) else temperature)


def kl_divergence(log_p: Array, log_q: Array, axis: int) -> Array:
    """KL(p, q) per example, of log-probabilities; where p is 0, nothing, and no gradient."""
    p = jnp.exp(log_p)
    log_p, log_q = only(p > 0, log_p, log_q)
    return jnp.sum(jnp.where(p > 0, p, 0.0) * (log_p - log_q), axis)


def labelled(
    labels: Any, logits: Any, axis: int, where: Any, ignore_label: int | None
) -> tuple[Int[Array, "..."], Any, Array]:
    """Labels that can be looked up, the mask without `ignore_label`, and NaN for labels of no class.

    Raises:
      ValueError: labels of another shape or dtype, or of no class (unless traced).
    """
    shape, classes = without(logits.shape, axis), logits.shape[axis]
    if tuple(jnp.shape(labels)) != shape or not jnp.issubdtype(
        jnp.result_type(labels), jnp.integer
    ):
        raise ValueError(
            f"labels: expected integers of shape {shape}, got {jnp.result_type(labels)} of "
            f"{tuple(jnp.shape(labels))}; take argmax of one-hot labels"
        )
    labels, keep = jnp.asarray(labels), counted(where, shape)
    if ignore_label is not None:
        seen = labels != ignore_label
        keep = seen if keep is None else keep & seen
    wrong = (labels < 0) | (labels >= classes)
    if keep is not None:
        wrong &= keep
    if not _checks.is_traced(wrong) and np.any(wrong):
        raise ValueError(
            f"labels: {int(labels[wrong][0])} is none of {classes} classes; leave examples out by "
            "where= or ignore_label="
        )
    return jnp.clip(labels, 0, classes - 1), keep, jnp.where(wrong, jnp.nan, 0.0)


def cross_entropy(s: Array, labels: Any, axis: int) -> Array:
    """Per example, of integer labels."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(s, axis), jnp.expand_dims(labels, axis), axis)
    return -jnp.squeeze(picked, axis)


def standardized(x: Array, axis: int, eps: float) -> Array:
    """Logits minus their mean, over their deviation (of n - 1 degrees of freedom) plus `eps`.

    Entries of -inf (no class of this example) stay, and count for nothing.
    """
    real = x > -jnp.inf
    (y,) = only(real, x)
    count = jnp.sum(real, axis, keepdims=True)
    centred = jnp.where(real, y - jnp.sum(y, axis, keepdims=True) / jnp.maximum(count, 1), 0.0)
    variance = jnp.sum(centred**2, axis, keepdims=True) / jnp.maximum(count - 1, 1)
    scaled = centred / (eps + jnp.sqrt(jnp.maximum(variance, 1e-37)))
    return jnp.where(real, scaled, -jnp.inf)


def pearson(a: Array, b: Array, axis: int, eps: float, where: Any = True) -> Array:
    """The correlation along an axis, of entries that count; 0 where there are none."""
    where = jnp.broadcast_to(where, a.shape)
    count = jnp.maximum(jnp.sum(where, axis, keepdims=True), 1)
    a, b = (
        jnp.where(where, x - jnp.sum(x, axis, keepdims=True) / count, 0.0)
        for x in only(where, a, b)
    )
    norms = [jnp.maximum(jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis), 1e-37)), eps) for x in (a, b)]
    return jnp.sum(a * b, axis) / (norms[0] * norms[1])
