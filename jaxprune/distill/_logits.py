"""Losses on logits: the student learns the teacher's distribution over classes.

Logits have shape (…, classes), or the classes along `axis`. The mean is over all examples (tokens).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune import _checks
from jaxprune.distill._reduce import reduced, same_classes, wide

_MASKED = -1e9


def _divergence(log_p: Array, log_q: Array, axis: int) -> Array:
    """KL(p, q) per example, of log-probabilities; where p is 0, nothing."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis)


def _log_softmax(x: Array, temperature: Any, axis: int) -> Array:
    return jax.nn.log_softmax(x / temperature, axis)


def _ready(s: Any, t: Any, temperature: Any, axis: int) -> list[Array]:
    same_classes(s, t, axis)
    _checks.positive("temperature", temperature)
    return wide(s, t)


def _labels_fit(labels: Any, logits: Any, axis: int) -> None:
    shape = tuple(n for i, n in enumerate(logits.shape) if i != axis % logits.ndim)
    if tuple(jnp.shape(labels)) != shape or not jnp.issubdtype(
        jnp.result_type(labels), jnp.integer
    ):
        raise ValueError(
            f"labels: expected integers of shape {shape}, got {jnp.result_type(labels)} of "
            f"{tuple(jnp.shape(labels))}; take argmax of one-hot labels"
        )


def kd(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    temperature: float = 4.0,
    axis: int = -1,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Knowledge distillation: `T² KL(softmax(t / T), softmax(s / T))`.

    Args:
      s, t: logits of student and teacher.
      temperature: T, above 0; softens both distributions.
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
    s, t = _ready(s, t, temperature, axis)
    values = _divergence(
        _log_softmax(t, temperature, axis), _log_softmax(s, temperature, axis), axis
    )
    return reduced(temperature**2 * values, reduction, where)


def cross_entropy(s: Array, labels: Array, axis: int) -> Array:
    """Per example, of integer labels."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(s, axis), jnp.expand_dims(labels, axis), axis)
    return -jnp.squeeze(picked, axis)


def kd_with_labels(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    labels: Int[Array, "..."],
    *,
    temperature: float = 4.0,
    alpha: float = 0.5,
    axis: int = -1,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """`alpha CE(s, labels) + (1 - alpha) T² KL(softmax(t / T), softmax(s / T))`.

    Args:
      s, t: logits of student and teacher.
      labels: integers.
      temperature: T, above 0.
      alpha: weight of the labels, in [0, 1].
      axis: of the classes.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, labels of another shape, numbers out of range.

    Example:
      >>> s, t = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> round(float(jp.distill.kd_with_labels(s, t, jnp.array([0]), alpha=1.0)), 4)
      0.1269

    Reference: Hinton et al., 2015, https://arxiv.org/abs/1503.02531
    """
    _checks.fraction("alpha", alpha)
    _labels_fit(labels, s, axis)
    soft = kd(s, t, temperature=temperature, axis=axis, reduction="none")
    hard = cross_entropy(*wide(s), labels, axis)
    return reduced(alpha * hard + (1 - alpha) * soft, reduction, where)


def dkd(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    labels: Int[Array, "..."],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    axis: int = -1,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Decoupled distillation: `T² (alpha TCKD + beta NCKD)`.

    TCKD is the divergence of (target class, all others); NCKD that among the other classes.

    Args:
      s, t: logits of student and teacher.
      labels: integers.
      alpha, beta: weights of the two parts.
      temperature: T, above 0.
      axis: of the classes.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, labels of another shape, a temperature not above 0.

    Example:
      >>> t = jnp.array([[2.0, 1.0, 0.0]])
      >>> float(jp.distill.dkd(t, t, jnp.array([0])))
      0.0

    Reference: Zhao et al., "Decoupled Knowledge Distillation", 2022, https://arxiv.org/abs/2203.08679
    """
    s, t = _ready(s, t, temperature, axis)
    _labels_fit(labels, s, axis)
    shape = [-1 if i == axis % s.ndim else 1 for i in range(s.ndim)]
    classes = jnp.arange(s.shape[axis]).reshape(shape)
    target = classes == jnp.expand_dims(labels, axis)

    def parts(x: Array) -> tuple[Array, Array]:
        log_p = _log_softmax(x, temperature, axis)
        own = jnp.sum(jnp.where(target, log_p, 0.0), axis)
        rest = jax.nn.logsumexp(jnp.where(target, _MASKED, log_p), axis)
        others = jax.nn.log_softmax(jnp.where(target, _MASKED, x / temperature), axis)
        return jnp.stack([own, rest], -1), others

    (s_binary, s_rest), (t_binary, t_rest) = parts(s), parts(t)
    tckd = _divergence(t_binary, s_binary, -1)
    nckd = _divergence(t_rest, jnp.where(target, t_rest, s_rest), axis)
    return reduced(temperature**2 * (alpha * tckd + beta * nckd), reduction, where)


def dist(
    s: Float[Array, "batch classes"],
    t: Float[Array, "batch classes"],
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-8,
) -> Float[Array, ""]:
    """DIST: one minus Pearson's correlation, of classes within examples and of examples within classes.

    `T² (beta (1 - mean_i r(s_i, t_i)) + gamma (1 - mean_c r(s_c, t_c)))` of softmax probabilities.

    Args:
      s, t: logits.
      temperature: T, above 0.
      beta, gamma: weights of the relation between classes and between examples.
      eps: least norm.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, a temperature not above 0.

    Example:
      >>> t = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 5.0]])
      >>> abs(round(float(jp.distill.dist(t, t)), 5))
      0.0

    Reference: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022,
    https://arxiv.org/abs/2205.10536
    """
    s, t = _ready(s, t, temperature, -1)
    p, q = (jax.nn.softmax(x / temperature, -1) for x in (s, t))
    between = 1 - jnp.mean(pearson(p, q, -1, eps))
    within = 1 - jnp.mean(pearson(p, q, 0, eps))
    return temperature**2 * (beta * between + gamma * within)


def pearson(a: Array, b: Array, axis: int, eps: float) -> Array:
    """The correlation along an axis."""
    a, b = (x - jnp.mean(x, axis, keepdims=True) for x in (a, b))
    norms = [jnp.maximum(jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis), 1e-37)), eps) for x in (a, b)]
    return jnp.sum(a * b, axis) / (norms[0] * norms[1])


def skd_instance(
    s: Float[Array, "batch classes"],
    t: Float[Array, "batch classes"],
    *,
    temperature: float = 4.0,
    unsure: bool = False,
) -> Float[Array, ""]:
    """Streamlined distillation, examples: `mean KL(softmax(t / T), softmax(s / T))`.

    Args:
      s, t: logits.
      temperature: T, above 0.
      unsure: as the authors' program has it: times T², and examples of which the teacher is surer than of
        the median one add nothing to the mean.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, a temperature not above 0.

    Example:
      >>> s, t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> round(float(jp.distill.skd_instance(s, t, temperature=1.0)), 4)
      0.4621

    Reference: Jeong et al., "Streamlined Knowledge Distillation", 2026
    """
    s, t = _ready(s, t, temperature, -1)
    values = _divergence(_log_softmax(t, temperature, -1), _log_softmax(s, temperature, -1), -1)
    if not unsure:
        return jnp.mean(values)
    sure = jax.lax.stop_gradient(jnp.max(jax.nn.softmax(t, -1), -1))
    return temperature**2 * jnp.mean(jnp.where(sure <= jnp.quantile(sure, 0.5), values, 0.0))


def logit_std_kd(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    temperature: float = 2.0,
    eps: float = 1e-7,
    axis: int = -1,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """`kd` of standardised logits: each example's minus their mean, over their standard deviation.

    Args:
      s, t: logits.
      temperature: T, above 0.
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
    s, t = _ready(s, t, temperature, axis)

    def standard(x: Array) -> Array:
        centred = x - jnp.mean(x, axis, keepdims=True)
        spread = jnp.sum(centred**2, axis, keepdims=True) / max(x.shape[axis] - 1, 1)
        return centred / (eps + jnp.sqrt(jnp.maximum(spread, 1e-37)))

    return kd(
        standard(s),
        standard(t),
        temperature=temperature,
        axis=axis,
        where=where,
        reduction=reduction,
    )


def divergence(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    kind: str = "reverse",
    temperature: float = 1.0,
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
      kind: which.
      temperature: T, above 0.
      alpha, beta: of those that have them.
      axis: of the classes.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, an unknown kind, numbers out of range.

    Example:
      >>> s, t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]])
      >>> round(float(jp.distill.divergence(s, t, kind="reverse")), 4)
      1.6596

    References: Gu et al., MiniLLM, 2023, https://arxiv.org/abs/2306.08543 (reverse); Agarwal et al., GKD,
    2023, https://arxiv.org/abs/2306.13649 (Jensen-Shannon); Ko et al., DistiLLM, 2024,
    https://arxiv.org/abs/2402.03898 (skew); Wang et al., ABKD, 2025, https://arxiv.org/abs/2505.04560
    """
    kinds = (
        "forward", "reverse", "symmetric", "jensen_shannon", "skew", "total_variation", "alpha_beta",
    )  # fmt: skip
    _checks.choice("kind", kind, kinds)
    s, t = _ready(s, t, temperature, axis)
    p, q = _log_softmax(t, temperature, axis), _log_softmax(s, temperature, axis)
    if kind == "alpha_beta":
        if alpha == 0 or beta == 0 or alpha + beta == 0:
            raise ValueError(
                f"alpha, beta: neither they nor their sum may be 0, got {alpha}, {beta}"
            )
        both = alpha + beta
        terms = (
            jnp.exp(alpha * p + beta * q)
            - alpha / both * jnp.exp(both * p)
            - beta / both * jnp.exp(both * q)
        )
        values = -jnp.sum(terms, axis) / (alpha * beta)
    elif kind in ("jensen_shannon", "skew"):
        if not 0 < alpha < 1:
            raise ValueError(f"alpha: expected a number in (0, 1), got {alpha}")
        mixed = jnp.logaddexp(p + jnp.log(alpha), q + jnp.log1p(-alpha))
        values = _divergence(p, mixed, axis)
        if kind == "jensen_shannon":
            values = alpha * values + (1 - alpha) * _divergence(q, mixed, axis)
    elif kind == "total_variation":
        values = 0.5 * jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q)), axis)
    else:
        there, back = _divergence(p, q, axis), _divergence(q, p, axis)
        values = {"forward": there, "reverse": back, "symmetric": 0.5 * (there + back)}[kind]
    return reduced(temperature**2 * values, reduction, where)


def top_k_kd(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    k: int,
    temperature: float = 1.0,
    rest: bool = True,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """`kd` on the teacher's k most probable classes, for large vocabularies.

    Args:
      s, t: logits; the classes are the last axis.
      k: classes kept per example, 1 to all.
      temperature: T, above 0.
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
    s, t = _ready(s, t, temperature, -1)
    _checks.positive_int("k", k)
    if k > t.shape[-1]:
        raise ValueError(f"k: {k} is more than the {t.shape[-1]} classes")
    index = jax.lax.top_k(t, k)[1]
    if rest:
        p, q = _log_softmax(t, temperature, -1), _log_softmax(s, temperature, -1)
        p, q = (jnp.take_along_axis(x, index, -1) for x in (p, q))
        if k < t.shape[-1]:
            left = lambda x: jnp.log(jnp.maximum(-jnp.expm1(jax.nn.logsumexp(x, -1)), 1e-30))
            p, q = (jnp.concatenate([x, left(x)[..., None]], -1) for x in (p, q))
    else:
        p, q = (_log_softmax(jnp.take_along_axis(x, index, -1), temperature, -1) for x in (t, s))
    return reduced(temperature**2 * _divergence(p, q, -1), reduction, where)


def sampled_kd(
    s: Float[Array, "... classes"],
    sampled: Int[Array, "... draws"],
    *,
    weights: Float[Array, "... draws"] | None = None,
    temperature: float = 1.0,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Cross-entropy to classes drawn from the teacher: an unbiased estimate of that to all of them.

    Draws are a few integers per token to store, instead of a vocabulary of logits.

    Args:
      s: logits of the student.
      sampled: classes drawn from the teacher, `jax.random.categorical(key, t / temperature)`.
      weights: of the draws, or equal ones; importance weights `p / proposal` of another proposal.
      temperature: T, above 0.
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
    _checks.positive("temperature", temperature)
    (s,) = wide(s)
    picked = jnp.take_along_axis(_log_softmax(s, temperature, -1), sampled, -1)
    weights = jnp.ones_like(picked) if weights is None else weights
    values = -jnp.sum(weights * picked, -1) / sampled.shape[-1]
    return reduced(temperature**2 * values, reduction, where)


def sequence_kd(
    s: Float[Array, "batch time classes"],
    tokens: Int[Array, "batch time"],
    *,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """Sequence-level distillation: cross-entropy to sequences that the teacher generated.

    Args:
      s: logits of the student at each place, reading the teacher's sequence (shifted by one).
      tokens: the teacher's tokens, of beam search or sampling.
      where: mask of places that count (no padding).
      reduction: `"mean"` (over places), `"sum"` or `"none"`.

    Returns:
      A scalar, or (batch, time).

    Raises:
      ValueError: tokens of another shape.

    Example:
      >>> logits = jnp.zeros((1, 3, 4))
      >>> round(float(jp.distill.sequence_kd(logits, jnp.array([[1, 2, 0]]))), 4)
      1.3863

    Reference: Kim & Rush, "Sequence-Level Knowledge Distillation", 2016, https://arxiv.org/abs/1606.07947
    """
    _labels_fit(tokens, s, -1)
    return reduced(cross_entropy(*wide(s), tokens, -1), reduction, where)


def regularized_kd(
    s: Float[Array, "... classes"],
    labels: Int[Array, "..."],
    *,
    correct: float = 0.99,
    temperature: float = 20.0,
    alpha: float = 0.1,
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
      temperature: T, above 0.
      alpha: weight of the labels, in [0, 1].
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
        s, t, labels, temperature=temperature, alpha=alpha, where=where, reduction=reduction
    )


def ranking(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    kind: str = "list",
    margin: float = 0.0,
    temperature: float = 1.0,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """The student learns the teacher's order of classes.

    - `"list"` (ListMLE): `-log` of the Plackett-Luce probability of the teacher's order under `s / T`.
    - `"pair"`: the mean of `max(0, margin - (s_i - s_j))` over all pairs that the teacher orders i
    before j.

    Args:
      s, t: logits; the classes are the last axis.
      kind: `"list"` or `"pair"`.
      margin: of pairs, at least 0.
      temperature: T, above 0.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, an unknown kind, numbers out of range.

    Example:
      >>> s = jnp.array([[3.0, 2.0, 1.0]])
      >>> float(jp.distill.ranking(s, s, kind="pair")), bool(jp.distill.ranking(-s, s) > 2)
      (0.0, True)

    References: Xia et al., "Listwise approach to learning to rank", 2008 (ListMLE); Cao et al., 2007
    """
    _checks.choice("kind", kind, ("list", "pair"))
    s, t = _ready(s, t, temperature, -1)
    s = s / temperature
    if kind == "list":
        order = jnp.argsort(-t, -1)
        ranked = jnp.take_along_axis(s, order, -1)
        tails = jax.lax.cumlogsumexp(ranked, axis=ranked.ndim - 1, reverse=True)
        return reduced(jnp.sum(tails - ranked, -1), reduction, where)
    if margin < 0:
        raise ValueError(f"margin: expected at least 0, got {margin}")
    before = t[..., :, None] > t[..., None, :]
    cost = jax.nn.relu(margin - (s[..., :, None] - s[..., None, :]))
    count = jnp.maximum(jnp.sum(before, (-1, -2)), 1)
    return reduced(jnp.sum(jnp.where(before, cost, 0.0), (-1, -2)) / count, reduction, where)
