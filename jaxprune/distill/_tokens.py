"""Losses on logits of large vocabularies, and from labels or generated tokens alone.

Logits are (…, classes).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune import _checks
from jaxprune.distill._logits import kd_with_labels
from jaxprune.distill._reduce import reduced
from jaxprune.distill._softmax import cross_entropy, kl_divergence, labelled, log_softmax, ready


def top_k_kd(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    k: int,
    temperature: Any = 1.0,
    rest: bool = True,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """`kd` on the teacher's k most probable classes, for large vocabularies.

    Args:
      s, t: logits; the classes are the last axis.
      k: classes kept per example, 1 to all.
      temperature: T, above 0, one for all or one per example.
      rest: all other classes count as one (exact mass); else both are normalised over the k.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: k out of range, class counts that differ, a temperature not above 0.

    Example:
      >>> s, t = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 1.0, 3.0]])
      >>> full, part = jp.distill.kd(s, t, temperature=1.0), jp.distill.top_k_kd(s, t, k=2)
      >>> bool(0 < part <= full)
      True

    Reference: Tan et al., "Multilingual NMT with Knowledge Distillation", 2019,
    https://arxiv.org/abs/1902.10461
    """
    s, t, temperature, where = ready(s, t, temperature, -1, where)
    _checks.positive_int("k", k)
    if k > t.shape[-1]:
        raise ValueError(f"k: {k} is more than the {t.shape[-1]} classes")
    index = jax.lax.top_k(t, k)[1]
    if rest:
        p, q = log_softmax(t, temperature, -1), log_softmax(s, temperature, -1)
        p, q = (jnp.take_along_axis(x, index, -1) for x in (p, q))
        if k < t.shape[-1]:
            left = lambda x: jnp.log(jnp.maximum(-jnp.expm1(jax.nn.logsumexp(x, -1)), 1e-30))
            p, q = (jnp.concatenate([x, left(x)[..., None]], -1) for x in (p, q))
    else:
        p, q = (log_softmax(jnp.take_along_axis(x, index, -1), temperature, -1) for x in (t, s))
    return reduced(temperature**2 * kl_divergence(p, q, -1), reduction, where)


def sampled_kd(
    s: Float[Array, "... classes"],
    sampled: Int[Array, "... draws"],
    *,
    weights: Float[Array, "... draws"] | None = None,
    temperature: Any = 1.0,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Cross-entropy to classes drawn from the teacher: an unbiased estimate of that to all of them.

    Draws are a few integers per token to store, instead of a vocabulary of logits.

    Args:
      s: logits of the student.
      sampled: classes drawn from the teacher, `jax.random.categorical(key, t / temperature)`.
      weights: of the draws, or equal ones; importance weights `p / proposal` of another proposal.
      temperature: T, above 0, one for all or one per example.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example: `-T² sum_d w_d log softmax(s / T)[sampled_d] / draws`.

    Raises:
      ValueError: a temperature not above 0.

    Example:
      >>> s = jnp.array([[0.0, 0.0]])
      >>> round(float(jp.distill.sampled_kd(s, jnp.array([[0, 1, 1]]))), 4)
      0.6931

    Reference: Anshumann et al., "Sparse Logit Sampling", 2025, https://arxiv.org/abs/2503.16870
    """
    s, _, temperature, where = ready(s, s, temperature, -1, where)
    picked = jnp.take_along_axis(log_softmax(s, temperature, -1), sampled, -1)
    weights = jnp.ones_like(picked) if weights is None else weights
    values = -jnp.sum(weights * picked, -1) / sampled.shape[-1]
    return reduced(temperature**2 * values, reduction, where)


def sequence_kd(
    s: Float[Array, "batch time classes"],
    tokens: Int[Array, "batch time"],
    *,
    ignore_label: int | None = None,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Sequence-level distillation: cross-entropy to sequences that the teacher generated.

    Args:
      s: logits of the student at each place, reading the teacher's sequence (shifted by one).
      tokens: the teacher's tokens, of beam search or sampling.
      ignore_label: places with this token (padding) do not count.
      where: mask of places that count (no padding).
      reduction: `"mean"` (over places), `"sum"` or `"none"`.

    Returns:
      A scalar, or (batch, time).

    Raises:
      ValueError: tokens of another shape or vocabulary (NaN where traced).

    Example:
      >>> logits = jnp.zeros((1, 3, 4))
      >>> round(float(jp.distill.sequence_kd(logits, jnp.array([[1, 2, 0]]))), 4)
      1.3863

    Reference: Kim & Rush, "Sequence-Level Knowledge Distillation", 2016, https://arxiv.org/abs/1606.07947
    """
    tokens, where, wrong = labelled(tokens, s, -1, where, ignore_label)
    s = ready(s, s, 1.0, -1, where)[0]
    return reduced(cross_entropy(s, tokens, -1) + wrong, reduction, where)


def regularized_kd(
    s: Float[Array, "... classes"],
    labels: Int[Array, "..."],
    *,
    correct: float = 0.99,
    temperature: Any = 20.0,
    alpha: float = 0.1,
    ignore_label: int | None = None,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Teacher-free distillation: `kd_with_labels` from a made-up teacher, akin to label smoothing.

    The teacher gives `correct` to the label and shares the rest evenly; with temperature 1 this is
    label smoothing.

    Args:
      s: logits.
      labels: integers.
      correct: the teacher's probability of the label, in (0, 1).
      temperature: T, above 0, one for all or one per example.
      alpha: weight of the labels, in [0, 1].
      ignore_label: examples with this label do not count, in any part.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: numbers out of range, labels of another shape.

    Example:
      >>> loss = jp.distill.regularized_kd(jnp.array([[5.0, 0.0, 0.0]]), jnp.array([0]))
      >>> bool(jnp.isfinite(loss))
      True

    Reference: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", 2020,
    https://arxiv.org/abs/1909.11723
    """
    if not 0 < correct < 1:
        raise ValueError(f"correct: expected a probability in (0, 1), got {correct}")
    classes = s.shape[-1]
    off = jnp.log((1 - correct) / max(classes - 1, 1))
    hit = jax.nn.one_hot(labels, classes, dtype=bool)
    t = jnp.where(hit, jnp.log(correct), off)
    return kd_with_labels(
        s,
        t,
        labels,
        temperature=temperature,
        alpha=alpha,
        ignore_label=ignore_label,
        where=where,
        reduction=reduction,
    )
