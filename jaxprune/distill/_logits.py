"""Losses on logits: the student learns the teacher's distribution over classes.

Logits have shape (…, classes), or the classes along `axis`. The mean is over all examples (tokens).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune import _checks
from jaxprune.distill._reduce import only, reduced
from jaxprune.distill._softmax import (
    cross_entropy,
    kl_divergence,
    labelled,
    log_softmax,
    ready,
    softened,
    standardized,
)

_MASKED = -1e9


def kd(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    temperature: Any = 4.0,
    axis: int = -1,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Knowledge distillation: `T² KL(softmax(t / T), softmax(s / T))`.

    Args:
      s, t: logits of student and teacher.
      temperature: T, above 0, one for all or one per example; softens both distributions.
      axis: of the classes.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"` (per example).

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, a temperature that is not above 0.

    Example:
      >>> s, t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> round(float(jp.distill.kd(s, t, temperature=1.0)), 4), float(jp.distill.kd(t, t))
      (0.4621, 0.0)

    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015,
    https://arxiv.org/abs/1503.02531
    """
    s, t, temperature, where = ready(s, t, temperature, axis, where)
    values = kl_divergence(
        log_softmax(t, temperature, axis), log_softmax(s, temperature, axis), axis
    )
    return reduced(temperature**2 * values, reduction, where)


def kd_with_labels(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    labels: Int[Array, "..."],
    *,
    temperature: Any = 4.0,
    alpha: float = 0.5,
    axis: int = -1,
    ignore_label: int | None = None,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """`alpha CE(s, labels) + (1 - alpha) T² KL(softmax(t / T), softmax(s / T))`.

    Args:
      s, t: logits of student and teacher.
      labels: integers.
      temperature: T, above 0, one for all or one per example.
      alpha: weight of the labels, in [0, 1].
      axis: of the classes.
      ignore_label: examples with this label do not count, in any part.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, numbers out of range, labels of another shape or
        of no class (a NaN where traced).

    Example:
      >>> s, t = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> round(float(jp.distill.kd_with_labels(s, t, jnp.array([0]), alpha=1.0)), 4)
      0.1269

    Reference: Hinton et al., 2015, https://arxiv.org/abs/1503.02531
    """
    _checks.fraction("alpha", alpha)
    labels, where, wrong = labelled(labels, s, axis, where, ignore_label)
    soft = kd(s, t, temperature=temperature, axis=axis, where=where, reduction="none")
    s = ready(s, t, temperature, axis, where)[0]
    hard = cross_entropy(s, labels, axis) + wrong
    return reduced(alpha * hard + (1 - alpha) * soft, reduction, where)


def dkd(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    labels: Int[Array, "..."],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: Any = 4.0,
    axis: int = -1,
    ignore_label: int | None = None,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Decoupled distillation: `T² (alpha TCKD + beta NCKD)`.

    TCKD is the divergence of (target class, all others); NCKD that among the other classes.

    Args:
      s, t: logits of student and teacher.
      labels: integers.
      alpha, beta: weights of the two parts.
      temperature: T, above 0, one for all or one per example.
      axis: of the classes.
      ignore_label: examples with this label do not count, in any part.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, a temperature not above 0, labels of another shape
        or of no class (a NaN where traced).

    Example:
      >>> t = jnp.array([[2.0, 1.0, 0.0]])
      >>> float(jp.distill.dkd(t, t, jnp.array([0])))
      0.0

    Reference: Zhao et al., "Decoupled Knowledge Distillation", 2022, https://arxiv.org/abs/2203.08679
    """
    labels, where, wrong = labelled(labels, s, axis, where, ignore_label)
    s, t, temperature, where = ready(s, t, temperature, axis, where)
    shape = [-1 if i == axis % s.ndim else 1 for i in range(s.ndim)]
    classes = jnp.arange(s.shape[axis]).reshape(shape)
    target = classes == jnp.expand_dims(labels, axis)

    def parts(x: Array) -> tuple[Array, Array]:
        log_p = log_softmax(x, temperature, axis)
        own = jnp.sum(jnp.where(target, log_p, 0.0), axis)
        rest = jax.nn.logsumexp(jnp.where(target, _MASKED, log_p), axis)
        others = jax.nn.log_softmax(
            jnp.where(target, _MASKED, softened(x, temperature, axis)), axis
        )
        return jnp.stack([own, rest], -1), others

    (s_binary, s_rest), (t_binary, t_rest) = parts(s), parts(t)
    tckd = kl_divergence(t_binary, s_binary, -1)
    nckd = kl_divergence(t_rest, jnp.where(target, t_rest, s_rest), axis)
    return reduced(temperature**2 * (alpha * tckd + beta * nckd) + wrong, reduction, where)


def logit_std_kd(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    temperature: Any = 2.0,
    eps: float = 1e-7,
    axis: int = -1,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """`kd` of standardised logits: each example's minus their mean, over their standard deviation.

    Entries of -inf (no class of this example) have probability 0 and are left out of both.

    Args:
      s, t: logits.
      temperature: T, above 0, one for all or one per example.
      eps: added to the deviation (which has n - 1 degrees of freedom).
      axis: of the classes.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, a temperature not above 0.

    Example:
      >>> s = jnp.array([[1.0, 2.0, 3.0]])
      >>> abs(round(float(jp.distill.logit_std_kd(s, 5 * s - 1)), 5))  # shift and scale do not matter
      0.0

    Reference: Sun et al., "Logit Standardization in Knowledge Distillation", 2024,
    https://arxiv.org/abs/2403.01427
    """
    s, t, temperature, where = ready(s, t, temperature, axis, where)
    return kd(
        standardized(s, axis, eps),
        standardized(t, axis, eps),
        temperature=temperature,
        axis=axis,
        where=where,
        reduction=reduction,
    )


def divergence(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    method: str = "reverse",
    temperature: Any = 1.0,
    alpha: float = 0.5,
    beta: float = 0.5,
    axis: int = -1,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Other divergences between the teacher's p and the student's q, times T².

    - `"forward"`: KL(p, q), as `kd`; `"reverse"`: KL(q, p), which seeks modes.
    - `"symmetric"`: their mean; `"jensen_shannon"`: `alpha KL(p, m) + (1 - alpha) KL(q, m)` with
      `m = alpha p + (1 - alpha) q`; `"skew"`: KL(p, alpha p + (1 - alpha) q).
    - `"total_variation"`: `sum |p - q| / 2`.
    - `"alpha_beta"`: the α-β divergence of Cichocki et al.,
      `-1 / (α β) sum(p^α q^β - α / (α+β) p^(α+β) - β / (α+β) q^(α+β))`; α, β, α + β not 0.

    Args:
      s, t: logits.
      method: which.
      temperature: T, above 0, one for all or one per example.
      alpha, beta: of those that have them.
      axis: of the classes.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, an unknown method, numbers out of range.

    Example:
      >>> s, t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]])
      >>> round(float(jp.distill.divergence(s, t, method="reverse")), 4)
      1.6596

    References: Gu et al., MiniLLM, 2023, https://arxiv.org/abs/2306.08543 (reverse); Agarwal et al., GKD,
    2023, https://arxiv.org/abs/2306.13649 (Jensen-Shannon); Ko et al., DistiLLM, 2024,
    https://arxiv.org/abs/2402.03898 (skew); Wang et al., ABKD, 2025, https://arxiv.org/abs/2505.04560
    """
    _checks.choice("method", method, tuple(_DIVERGENCES))
    if method == "alpha_beta" and (alpha == 0 or beta == 0 or alpha + beta == 0):
        raise ValueError(f"alpha, beta: neither they nor their sum may be 0, got {alpha}, {beta}")
    if method in ("jensen_shannon", "skew") and not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number in (0, 1), got {alpha}")
    s, t, temperature, where = ready(s, t, temperature, axis, where)
    p, q = log_softmax(t, temperature, axis), log_softmax(s, temperature, axis)
    return reduced(temperature**2 * _DIVERGENCES[method](p, q, axis, alpha, beta), reduction, where)


def _skew(p: Array, q: Array, axis: int, alpha: Any, beta: Any) -> Array:
    return kl_divergence(p, _mixed(p, q, alpha), axis)


def _jensen_shannon(p: Array, q: Array, axis: int, alpha: Any, beta: Any) -> Array:
    mixed = _mixed(p, q, alpha)
    return alpha * kl_divergence(p, mixed, axis) + (1 - alpha) * kl_divergence(q, mixed, axis)


def _mixed(p: Array, q: Array, alpha: Any) -> Array:
    real = (p > -jnp.inf) | (q > -jnp.inf)
    p, q = only(real, p, q)
    return jnp.where(real, jnp.logaddexp(p + jnp.log(alpha), q + jnp.log1p(-alpha)), -jnp.inf)


def _alpha_beta(p: Array, q: Array, axis: int, alpha: Any, beta: Any) -> Array:
    both = alpha + beta
    terms = (
        jnp.exp(alpha * p + beta * q)
        - alpha / both * jnp.exp(both * p)
        - beta / both * jnp.exp(both * q)
    )
    return -jnp.sum(terms, axis) / (alpha * beta)


_DIVERGENCES = {
    "forward": lambda p, q, axis, *_: kl_divergence(p, q, axis),
    "reverse": lambda p, q, axis, *_: kl_divergence(q, p, axis),
    "symmetric": lambda p, q, axis, *_: (
        0.5 * (kl_divergence(p, q, axis) + kl_divergence(q, p, axis))
    ),
    "jensen_shannon": _jensen_shannon,
    "skew": _skew,
    "total_variation": lambda p, q, axis, *_: 0.5 * jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q)), axis),
    "alpha_beta": _alpha_beta,
}
