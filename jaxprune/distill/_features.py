"""Losses on features: the student learns intermediate values of the teacher.

Where student and teacher differ in size, a projector brings them together first
(`jp.distill.dense_projector`, `conv_projector`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune.distill._logits import kd
from jaxprune.distill._reduce import (
    counted,
    flat,
    normalized,
    only,
    reduced,
    safe_norm,
    same_batch,
    same_shapes,
    wide,
)
from jaxprune.distill._softmax import without

Pair = tuple[Any, Any]


def hint(s: Array, t: Array, *, where: Any = None, reduction: str = "mean") -> Float[Array, "..."]:
    """FitNets: the mean squared difference, `(s - t)²`.

    Args:
      s, t: features of one shape.
      where: mask that broadcasts against them.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or the squared differences.

    Raises:
      ValueError: shapes that differ: a projector is needed.

    Example:
      >>> float(jp.distill.hint(jnp.ones((2, 3)), jnp.zeros((2, 3))))
      1.0

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets", 2014, https://arxiv.org/abs/1412.6550
    """
    same_shapes(s, t)
    s, t = only(counted(where, s.shape), *wide(s, t))
    return reduced(jnp.square(s - t), reduction, where)


def cosine(
    s: Array, t: Array, *, axis: int = -1, where: Any = None, reduction: str = "mean"
) -> Array:
    """One minus the cosine along an axis.

    Args:
      s, t: features of one shape.
      axis: of the features.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or one value per example.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> float(jp.distill.cosine(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]])))
      1.0

    Reference: Sanh et al., DistilBERT, 2019, https://arxiv.org/abs/1910.01108
    """
    same_shapes(s, t)
    keep = counted(where, without(s.shape, axis))
    s, t = only(None if keep is None else jnp.expand_dims(keep, axis), *wide(s, t))
    return reduced(1 - jnp.sum(normalized(s, axis) * normalized(t, axis), axis), reduction, where)


def whitened_mse(s: Array, t: Array, *, eps: float = 1e-5, reduction: str = "mean") -> Array:
    """The squared difference of features, each standardised over the batch (and space).

    Args:
      s, t: features of one shape, channels last.
      eps: added to variances.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or the squared differences.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> x = jnp.array([[1.0, 5.0], [2.0, 9.0], [4.0, 1.0]])
      >>> round(float(jp.distill.whitened_mse(3 * x + 1, x)), 3)  # shift and scale do not matter
      0.0

    Reference: Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019,
    https://arxiv.org/abs/1904.01866 (batch normalisation before the distance)
    """
    same_shapes(s, t)

    def white(x: Array) -> Array:
        axes = tuple(range(x.ndim - 1))
        centred = x - jnp.mean(x, axes)
        return centred * jax.lax.rsqrt(jnp.mean(centred**2, axes) + eps)

    s, t = wide(s, t)
    return reduced(jnp.square(white(s) - white(t)), reduction)


def vid(
    mean: Array, var: Array, t: Array, *, where: Any = None, reduction: str = "mean"
) -> Float[Array, "..."]:
    """Variational information distillation: `((mean - t)² / var + log var) / 2`.

    Args:
      mean, var: what the student makes of the teacher's features, and with which variance, above 0; see
        `jp.distill.vid_regressor`.
      t: the teacher's features.
      where: mask that broadcasts against them.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or all values.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> x = jnp.ones((2, 3))
      >>> float(jp.distill.vid(x, jnp.ones(3), x))
      0.0

    Reference: Ahn et al., "Variational Information Distillation", 2019, https://arxiv.org/abs/1904.05835
    """
    same_shapes(mean, t)
    keep = counted(where, t.shape)
    mean, t = only(keep, *wide(mean, t))
    (var,) = only(keep, *wide(var), fill=1.0)
    return reduced(0.5 * (jnp.square(mean - t) / var + jnp.log(var)), reduction, where)


def pad(
    s: Array, t: Array, log_var: Array, *, eps: float = 1e-6, reduction: str = "mean"
) -> Float[Array, "..."]:
    """Prime-aware adaptive distillation: `(t - s)² / (eps + exp(log_var)) + log_var`, the mean per
    example.

    Args:
      s, t: features of one shape.
      log_var: the student's log-variance of each example, (batch, 1) or like the features, flattened.
      eps: added to variances.
      reduction: `"mean"`, `"sum"` or `"none"`, over examples.

    Returns:
      A scalar, or (batch,).

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> x = jnp.ones((2, 3))
      >>> float(jp.distill.pad(x, x, jnp.zeros((2, 1))))
      0.0

    Reference: Zhang et al., "Prime-Aware Adaptive Distillation", 2020, https://arxiv.org/abs/2008.01458
    """
    same_shapes(s, t)
    s, t, log_var = wide(flat(s), flat(t), log_var)
    values = jnp.square(t - s) / (eps + jnp.exp(log_var)) + log_var
    return reduced(jnp.mean(values, 1), reduction)


def factor_transfer(s: Array, t: Array, *, p: int = 1, reduction: str = "mean") -> Float[Array, ""]:
    """Factor transfer: the distance of factors of unit length.

    Args:
      s: the translator's output on the student's features.
      t: the paraphraser's on the teacher's (`jp.distill.conv_projector` makes both).
      p: norm of the difference: 1 (mean absolute difference) or another (mean norm per example).
      reduction: `"mean"` or `"sum"`.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4))
      >>> round(float(jp.distill.factor_transfer(x, 3 * x)), 6)
      0.0

    Reference: Kim et al., "Paraphrasing Complex Network", 2018, https://arxiv.org/abs/1802.04977
    """
    return kta(s, t, p=p, q=2, reduction=reduction)


def kta(s: Array, t: Array, *, p: int = 1, q: int = 2, reduction: str = "mean") -> Float[Array, ""]:
    """Knowledge translation and adaptation: the p-distance of features of q-norm 1.

    Args:
      s: the feature adapter's output on the student.
      t: the knowledge translator's on the teacher.
      p: norm of the difference: 1 (mean absolute difference) or another (mean norm per example).
      q: norm by which features are divided.
      reduction: `"mean"` or `"sum"`.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4))
      >>> round(float(jp.distill.kta(x, 3 * x)), 6)
      0.0

    Reference: He et al., "Knowledge Adaptation for Efficient Semantic Segmentation", 2019,
    https://arxiv.org/abs/1903.04688
    """
    same_shapes(s, t)
    norm = lambda x, order: jnp.linalg.norm(x, ord=order, axis=1, keepdims=True)
    s, t = (x / jnp.maximum(norm(x, q), 1e-30) for x in (flat(y) for y in wide(s, t)))
    if p == 1:
        return reduced(jnp.abs(s - t), reduction)
    distance = safe_norm(s - t, 1) if p == 2 else norm(s - t, p)[:, 0]
    return reduced(distance, reduction)


def activation_boundary(
    s: Array, t: Array, *, margin: float = 1.0, reduction: str = "mean"
) -> Float[Array, ""]:
    """Activation boundaries: the student's values lie on the teacher's side of zero, by a margin.

    `(s + m)²` where `s > -m` and `t <= 0`; `(s - m)²` where `s <= m` and `t > 0`; summed.

    Args:
      s, t: values before an activation, of one shape.
      margin: m, above 0.
      reduction: `"mean"` over the batch, or `"sum"`.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, a margin not above 0.

    Example:
      >>> s, t = jnp.array([[0.5, 2.0]]), jnp.array([[-1.0, 3.0]])
      >>> float(jp.distill.activation_boundary(s, t, margin=1.0))
      2.25

    Reference: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries", 2019,
    https://arxiv.org/abs/1811.03233
    """
    same_shapes(s, t)
    _checks.positive("margin", margin)
    s, t = wide(s, t)
    low = jnp.where((s > -margin) & (t <= 0), jnp.square(s + margin), 0.0)
    high = jnp.where((s <= margin) & (t > 0), jnp.square(s - margin), 0.0)
    return reduced(jnp.sum(flat(low + high), 1), reduction)


def srd(s: Pair, t: Pair, *, exponent: float = 1.0, temperature: float = 1.0) -> Float[Array, ""]:
    """Simple recipe distillation: `2 log sum |s - t|^exponent` of features plus KL of logits.

    Args:
      s, t: `(features, logits)`; the student's features projected and both normalised over the batch
        (`jp.distill.batch_normalized`).
      exponent: of the differences, above 0.
      temperature: of the logits, above 0.

    Returns:
      A scalar; the divergence is the mean over the batch, without a factor T².

    Raises:
      ValueError: shapes that differ, numbers not above 0.

    Example:
      >>> s, t = (jnp.zeros((1, 2)), jnp.ones((1, 3))), (jnp.ones((1, 2)), jnp.ones((1, 3)))
      >>> round(float(jp.distill.srd(s, t)), 4)
      1.3863

    Reference: Miles & Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation",
    2024, https://arxiv.org/abs/2303.11098
    """
    _checks.positive("exponent", exponent)
    same_shapes(s[0], t[0])
    (a, b) = wide(s[0], t[0])
    size = jnp.abs(a - b)
    powers = jnp.where(size > 0, jnp.power(jnp.where(size > 0, size, 1.0), exponent), 0.0)
    soft = kd(s[1], t[1], temperature=temperature) / temperature**2
    return 2 * jnp.log(jnp.sum(powers)) + soft


def batch_normalized(x: Array, *, eps: float = 1e-4) -> Array:
    """Features standardised over all axes but the last, without parameters.

    Args:
      x: features, channels last.
      eps: added to variances.

    Returns:
      The same shape.

    Example:
      >>> jp.distill.batch_normalized(jnp.array([[1.0], [3.0]])).round(2).ravel().tolist()
      [-1.0, 1.0]
    """
    (x,) = wide(x)
    axes = tuple(range(x.ndim - 1))
    centred = x - jnp.mean(x, axes)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axes) + eps)


def mgd(s: Array, t: Array, *, reduction: str = "mean") -> Float[Array, ""]:
    """Masked generative distillation: the squared difference of what a generator makes of masked
    features.

    Args:
      s: the generator's output on the student's masked features (`jp.distill.mgd_generator`).
      t: the teacher's features, of one shape.
      reduction: `"mean"` over the batch, or `"sum"`.

    Returns:
      A scalar: squared differences summed over an example.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> float(jp.distill.mgd(jnp.ones((2, 2, 2, 1)), jnp.zeros((2, 2, 2, 1))))
      4.0

    Reference: Yang et al., "Masked Generative Distillation", 2022, https://arxiv.org/abs/2205.01529
    """
    same_shapes(s, t)
    same_batch(s, t)
    s, t = wide(s, t)
    return reduced(jnp.sum(flat(jnp.square(s - t)), 1), reduction)
