"""Losses on relations: the student learns how the teacher's features lie to each other.

Features are (batch, …), flattened where a relation is between examples; their sizes may differ.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune.distill._reduce import (
    flat,
    normalized,
    safe_norm,
    same_batch,
    same_shapes,
    smooth_l1,
    wide,
)


def _rows(s: Any, t: Any) -> tuple[Array, Array]:
    same_batch(s, t)
    s, t = wide(s, t)
    return flat(s), flat(t)


def rkd_distance(s: Array, t: Array, *, eps: float = 1e-12) -> Float[Array, ""]:
    """Relational distillation of distances: Huber's loss of pairwise distances over their mean.

    Args:
      s, t: features, (batch, …); sizes may differ.
      eps: least squared distance.

    Returns:
      A scalar, the mean over all pairs.

    Raises:
      ValueError: batches that differ.

    Example:
      >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
      >>> round(float(jp.distill.rkd_distance(x, 2 * x)), 6)
      0.0

    Reference: Park et al., "Relational Knowledge Distillation", 2019, https://arxiv.org/abs/1904.05068
    """
    s, t = _rows(s, t)
    return jnp.mean(smooth_l1(_distances(s, eps) - _distances(t, eps)))


def _distances(x: Array, eps: float) -> Array:
    squares = jnp.sum(x * x, 1)
    squared = jnp.maximum(squares[:, None] + squares[None, :] - 2 * x @ x.T, eps)
    off = ~jnp.eye(len(x), dtype=bool)
    found = jnp.where(off, jnp.sqrt(squared), 0.0)
    mean = jnp.sum(found) / jnp.maximum(jnp.sum(found > 0), 1)
    return found / jnp.where(mean > 0, mean, 1.0)


def rkd_angle(s: Array, t: Array) -> Float[Array, ""]:
    """Relational distillation of angles: Huber's loss of the cosines within all triples.

    Args:
      s, t: features, (batch, …); sizes may differ.

    Returns:
      A scalar, the mean over batch³ triples.

    Raises:
      ValueError: batches that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (4, 3))
      >>> round(float(jp.distill.rkd_angle(x, 2 * x + 1)), 6)
      0.0

    Reference: Park et al., 2019, https://arxiv.org/abs/1904.05068
    """
    s, t = _rows(s, t)

    def cosines(x: Array) -> Array:
        ways = normalized(x[None, :, :] - x[:, None, :], 2)
        return jnp.einsum("ijd,ikd->ijk", ways, ways)

    return jnp.mean(smooth_l1(cosines(s) - cosines(t)))


def cckd(
    s: Float[Array, "batch features"],
    t: Float[Array, "batch features"],
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    reduction: str = "mean",
) -> Float[Array, ""]:
    """Correlation congruence: the distance between the examples' correlation matrices.

    Args:
      s, t: embeddings, of unit length for the Gaussian kernel; sizes may differ.
      kernel: `"bilinear"` `x·y`, or `"gaussian"`: the Taylor series of `exp(-gamma |x - y|²)`,
        `exp(-2 gamma) sum_p (2 gamma)^p / p! (x·y)^p` up to `order`.
      gamma: of the Gaussian, above 0.
      order: of the series, at least 1.
      reduction: `"mean"` (over batch²), or `"sum"`.

    Returns:
      A scalar: the Frobenius norm of the difference.

    Raises:
      ValueError: batches that differ, an unknown kernel, numbers out of range.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (4, 3))
      >>> float(jp.distill.cckd(x, x))
      0.0

    Reference: Peng et al., "Correlation Congruence for Knowledge Distillation", 2019,
    https://arxiv.org/abs/1904.01802
    """
    _checks.choice("kernel", kernel, ("bilinear", "gaussian"))
    _checks.choice("reduction", reduction, ("mean", "sum"))
    _checks.positive("gamma", gamma)
    _checks.positive_int("order", order)
    s, t = _rows(s, t)

    def matrix(x: Array) -> Array:
        inner = x @ x.T
        if kernel == "bilinear":
            return inner
        terms = [(2 * gamma) ** p / math.factorial(p) * inner**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(terms[1:], start=terms[0])

    distance = safe_norm(matrix(s) - matrix(t), None)
    return distance / len(s) ** 2 if reduction == "mean" else distance


def similarity_preserving(
    s: Array, t: Array, *, norm: int = 1, reduction: str = "mean"
) -> Float[Array, ""]:
    """Similarity-preserving distillation: the squared distance of the examples' Gram matrices, each row
    divided by its norm.

    Args:
      s, t: features, (batch, …); sizes may differ.
      norm: of rows: 1 (the sum of magnitudes, as torchdistill has it) or 2 (as in the paper).
      reduction: `"mean"` (over batch²), or `"sum"`.

    Returns:
      A scalar.

    Raises:
      ValueError: batches that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (4, 3))
      >>> round(float(jp.distill.similarity_preserving(x, 2 * x)), 6)
      0.0

    Reference: Tung & Mori, "Similarity-Preserving Knowledge Distillation", 2019,
    https://arxiv.org/abs/1907.09682
    """
    _checks.choice("reduction", reduction, ("mean", "sum"))
    s, t = _rows(s, t)
    _checks.choice("norm", norm, (1, 2))

    def gram(x: Array) -> Array:
        product = x @ x.T
        if norm == 2:
            return normalized(product, 1)
        return product / jnp.maximum(jnp.sum(jnp.abs(product), 1, keepdims=True), 1e-12)

    total = jnp.sum(jnp.square(gram(s) - gram(t)))
    return total / len(s) ** 2 if reduction == "mean" else total


def pkt(s: Array, t: Array, *, eps: float = 1e-7) -> Float[Array, ""]:
    """Probabilistic knowledge transfer: the divergence of cosine similarities read as probabilities.

    Args:
      s, t: features, (batch, …); sizes may differ.
      eps: added to norms and within logarithms.

    Returns:
      A scalar, the mean over all pairs.

    Raises:
      ValueError: batches that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (4, 3))
      >>> abs(round(float(jp.distill.pkt(x, 2 * x)), 6))
      0.0

    Reference: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
    2018, https://arxiv.org/abs/1803.10837
    """
    s, t = _rows(s, t)

    def chances(x: Array) -> Array:
        x = x / (safe_norm(x, 1, keepdims=True) + eps)
        alike = (x @ x.T + 1) / 2
        return alike / jnp.sum(alike, 1, keepdims=True)

    p, q = chances(t), chances(s)
    return jnp.mean(p * jnp.log((p + eps) / (q + eps)))


def ickd(s: Array, t: Array) -> Float[Array, ""]:
    """Inter-channel correlation: the squared distance of the channels' Gram matrices, rows of unit
    length.

    Args:
      s, t: (batch, height, width, channels) of as many channels.

    Returns:
      A scalar: summed per example, over channels and batch², as the authors' code has it.

    Raises:
      ValueError: channels or batch that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
      >>> round(float(jp.distill.ickd(x, 2 * x)), 6)
      0.0

    Reference: Liu et al., "Exploring Inter-Channel Correlation", 2021
    """
    same_batch(s, t)
    if s.shape[-1] != t.shape[-1]:
        same_shapes(s, t)
    s, t = wide(s, t)

    def gram(x: Array) -> Array:
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return normalized(jnp.einsum("bpi,bpj->bij", x, x), 2)

    return jnp.sum(jnp.square(gram(s) - gram(t))) / (s.shape[-1] * s.shape[0] ** 2)


def affinity(s: Array, t: Array, *, reduction: str = "mean") -> Float[Array, ""]:
    """Affinity distillation: per channel, the distance of the outer products of its map of unit length.

    Args:
      s, t: (batch, height, width, channels) of one shape.
      reduction: `"mean"` over the batch, or `"sum"`.

    Returns:
      A scalar: distances over the places of a map, summed over channels.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
      >>> round(float(jp.distill.affinity(x, 2 * x)), 4)
      0.0

    Reference: He et al., "Knowledge Adaptation for Efficient Semantic Segmentation", 2019,
    https://arxiv.org/abs/1903.04688
    """
    _checks.choice("reduction", reduction, ("mean", "sum"))
    same_shapes(s, t)
    s, t = (normalized(x.reshape(x.shape[0], -1, x.shape[-1]), 1) for x in wide(s, t))
    # |x xᵀ - y yᵀ|² = |x|⁴ + |y|⁴ - 2 (x·y)²: no matrix of places by places is made
    inner = jnp.sum(s * t, 1)
    fourth = lambda x: jnp.square(jnp.sum(x * x, 1))
    squared = jnp.maximum(fourth(s) + fourth(t) - 2 * inner * inner, 0.0)
    zero = squared <= 1e-12
    distance = jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))
    each = jnp.sum(distance, 1) / s.shape[1]
    return jnp.mean(each) if reduction == "mean" else jnp.sum(each)


def cka(s: Array, t: Array) -> Float[Array, ""]:
    """One minus linear centred kernel alignment of the examples' features.

    Args:
      s, t: features, (batch, …); sizes may differ.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: batches that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (6, 3))
      >>> abs(round(float(jp.distill.cka(x, 2 * x[:, ::-1] + 1)), 5))  # rotations do not matter
      0.0

    Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019,
    https://arxiv.org/abs/1905.00414
    """
    s, t = (x - jnp.mean(x, 0) for x in _rows(s, t))
    # of batch x batch matrices: their inner products, whatever the features
    a, b = s @ s.T, t @ t.T
    return 1 - jnp.sum(a * b) / jnp.maximum(safe_norm(a, None) * safe_norm(b, None), 1e-30)


def info_nce(
    s: Float[Array, "batch features"],
    t: Float[Array, "batch features"],
    *,
    temperature: float = 0.07,
    normalize: bool = True,
) -> Float[Array, ""]:
    """InfoNCE: each student embedding finds the teacher's of the same example among the batch.

    `-mean_i log softmax_j(s_i · t_j / T)_i`

    Args:
      s, t: embeddings of one shape.
      temperature: T, above 0.
      normalize: make embeddings of unit length first.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, a temperature not above 0.

    Example:
      >>> x = jnp.eye(3)
      >>> bool(jp.distill.info_nce(x, x) < 1e-4)
      True

    Reference: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
    https://arxiv.org/abs/1807.03748
    """
    same_shapes(s, t)
    _checks.positive("temperature", temperature)
    s, t = wide(s, t)
    if normalize:
        s, t = normalized(s, -1), normalized(t, -1)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(s @ t.T / temperature, -1)))


def skd_direction(
    s: Float[Array, "batch classes"],
    t: Float[Array, "batch classes"],
    *,
    ridge: float = 0.1,
    scale: float = 1.0,
) -> Float[Array, ""]:
    """Streamlined distillation, directions: Mahalanobis distances of the examples' Gram matrices.

    `mean_i sqrt(D_i' (cov(D) + ridge I)^-1 D_i)` with `D` the difference of the Gram matrices of logits
    of unit norm.

    Args:
      s, t: logits.
      ridge: added to the diagonal of the covariance, above 0.
      scale: Gram matrices are divided by it: 1 in the paper, the number of classes in the authors'
        program (which also multiplies the loss by about a half).

    Returns:
      A scalar.

    Raises:
      ValueError: batches that differ, fewer than two examples, numbers not above 0.

    Example:
      >>> t = jax.random.normal(jax.random.key(0), (4, 3))
      >>> float(jp.distill.skd_direction(2 * t, t))
      0.0

    Reference: Jeong et al., "Streamlined Knowledge Distillation", 2026
    """
    _checks.positive("ridge", ridge)
    _checks.positive("scale", scale)
    s, t = _rows(s, t)
    if len(s) < 2:
        raise ValueError(f"s: a batch of {len(s)}, expected at least two examples")
    grams = [x @ x.T / scale for x in (normalized(y, 1) for y in (s, t))]
    differences = grams[0] - grams[1]
    spread = jnp.cov(differences, rowvar=False) + ridge * jnp.eye(len(s))
    # |L^-1 d| with spread = L L'
    half = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(spread), differences.T, lower=True)
    return jnp.mean(safe_norm(half, 0))
