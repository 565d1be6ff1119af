"""Losses on features: the student learns intermediate values of the teacher.

Images are (batch, height, width, channels). Where student and teacher differ in channels, a projector
brings them together first (`jp.distill.dense_projector`, `conv_projector`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune.distill._logits import dist, kd, pearson
from jaxprune.distill._reduce import (
    flat,
    normalized,
    reduced,
    safe_norm,
    same_batch,
    same_shapes,
    wide,
)

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
    s, t = wide(s, t)
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
    s, t = wide(s, t)
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


def attention_transfer(s: Array, t: Array, *, mode: str = "code") -> Float[Array, ""]:
    """Attention transfer: where features are large, as maps of unit length.

    The map is the mean (in the paper: sum) of squares over channels. `"code"`, as the authors' code:
    the mean squared difference; `"paper"`: the mean norm of the difference of an example.

    Args:
      s, t: (batch, height, width, channels); channels may differ.
      mode: `"code"` or `"paper"`.

    Returns:
      A scalar.

    Raises:
      ValueError: batch or image sizes that differ, an unknown mode.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
      >>> round(float(jp.distill.attention_transfer(x, 2 * x)), 6)
      0.0

    Reference: Zagoruyko & Komodakis, "Paying More Attention to Attention", 2017,
    https://arxiv.org/abs/1612.03928
    """
    _checks.choice("mode", mode, ("code", "paper"))
    _same_images(s, t)
    s, t = wide(s, t)
    over = jnp.mean if mode == "code" else jnp.sum
    difference = normalized(flat(over(s * s, -1)), 1) - normalized(flat(over(t * t, -1)), 1)
    if mode == "code":
        return jnp.mean(difference**2)
    return jnp.mean(safe_norm(difference, 1))


def _same_images(s: Any, t: Any) -> None:
    if s.ndim < 3 or s.shape[:-1] != t.shape[:-1]:
        raise ValueError(
            f"teacher: images of {t.shape[:-1]} (batch, height, width), the student has {s.shape[:-1]}; "
            "pool the larger with jp.distill.resized"
        )


def resized(x: Float[Array, "b h w c"], size: tuple[int, int], *, how: str = "mean") -> Array:
    """Images pooled to a size: each place is the mean (or maximum) of the bins that fall to it.

    Bins of an axis of n are `[floor(i n / m), ceil((i + 1) n / m))`, as in adaptive pooling.

    Args:
      x: (batch, height, width, channels).
      size: height and width wanted.
      how: `"mean"` or `"max"`.

    Returns:
      (batch, *size, channels).

    Raises:
      ValueError: a size below 1, or an unknown `how`.

    Example:
      >>> jp.distill.resized(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, :, :, 0].tolist()
      [[2.5, 4.5], [10.5, 12.5]]
    """
    _checks.choice("how", how, ("mean", "max"))
    for n in size:
        _checks.positive_int("size", n)
    for axis, m in zip((1, 2), size, strict=True):
        n = x.shape[axis]
        if n == m:
            continue
        if n % m == 0:
            split = x.reshape(*x.shape[:axis], m, n // m, *x.shape[axis + 1 :])
            x = (jnp.mean if how == "mean" else jnp.max)(split, axis + 1)
            continue
        parts = [
            jax.lax.slice_in_dim(x, i * n // m, -(-(i + 1) * n // m), axis=axis) for i in range(m)
        ]
        pool = jnp.mean if how == "mean" else jnp.max
        x = jnp.concatenate([pool(part, axis, keepdims=True) for part in parts], axis)
    return x


def fsp(s: Pair, t: Pair) -> Float[Array, ""]:
    """Flow of solution procedure: how features of one layer go with those of another.

    `sum_c |G_s - G_t|_c` per example, with `G = F1ᵀ F2 / (h w)` and norms over the first layer's
    channels.

    Args:
      s, t: pairs of images (batch, height, width, channels) of two layers; the larger ones are
        max-pooled.

    Returns:
      A scalar, the mean over the batch.

    Raises:
      ValueError: channels or batch that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
      >>> float(jp.distill.fsp((x, x), (x, x)))
      0.0

    Reference: Yim et al., "A Gift from Knowledge Distillation", 2017
    """
    a, b = (_flow(*wide(*pair)) for pair in (s, t))
    same_shapes(a, b)
    return jnp.sum(safe_norm(a - b, 1)) / a.shape[0]


def _flow(a: Array, b: Array) -> Array:
    size = (min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2]))
    a, b = resized(a, size, how="max"), resized(b, size, how="max")
    return jnp.einsum("bhwi,bhwj->bij", a, b) / (size[0] * size[1])


def nst(s: Array, t: Array, *, kernel: str = "polynomial", sigma: float = 1.0) -> Float[Array, ""]:
    """Neuron selectivity transfer: the maximum mean discrepancy of channels' maps of unit length.

    `mean k(t, t) + mean k(s, s) - 2 mean k(s, t)` over pairs of channels of an example.

    Args:
      s, t: (batch, height, width, channels); channels may differ.
      kernel: `"linear"` `x·y`, `"polynomial"` `(x·y)²`, or `"gaussian"` `exp(-|x - y|² / (2 sigma²))`.
      sigma: of the Gaussian, above 0.

    Returns:
      A scalar.

    Raises:
      ValueError: batch or image sizes that differ, an unknown kernel.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
      >>> abs(round(float(jp.distill.nst(x, x)), 6))
      0.0

    Reference: Huang & Wang, "Like What You Like", 2017, https://arxiv.org/abs/1707.01219
    """
    _checks.choice("kernel", kernel, ("linear", "polynomial", "gaussian"))
    _checks.positive("sigma", sigma)
    _same_images(s, t)
    s, t = (normalized(x.reshape(x.shape[0], -1, x.shape[-1]), 1) for x in wide(s, t))

    def mean(x: Array, y: Array) -> Array:
        inner = jnp.einsum("bpi,bpj->bij", x, y)
        if kernel == "gaussian":
            squares = lambda z: jnp.sum(z * z, 1)
            distance = squares(x)[:, :, None] + squares(y)[:, None, :] - 2 * inner
            return jnp.mean(jnp.exp(-jnp.maximum(distance, 0) / (2 * sigma**2)), (1, 2))
        return jnp.mean(inner if kernel == "linear" else inner * inner, (1, 2))

    return jnp.mean(mean(t, t) + mean(s, s) - 2 * mean(s, t))


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
    mean, var, t = wide(mean, var, t)
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


def dist_plus(
    s: Pair,
    t: Pair,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    channels: float = 1.0,
    places: float = 1.0,
    eps: float = 1e-8,
) -> Float[Array, ""]:
    """DIST+: `dist` of logits, and one minus Pearson's correlation of features, in two ways.

    `dist + channels (1 - mean r over channels at each place) + places (1 - mean r over the batch of each
    place's sum of channels)`.

    Args:
      s, t: `(features, logits)`; features (batch, height, width, channels) of one shape.
      temperature, beta, gamma: of `jp.distill.dist`.
      channels, places: weights of the relations of features.
      eps: least norm.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, a temperature not above 0.

    Example:
      >>> t = (jax.random.normal(jax.random.key(0), (4, 3, 3, 5)), jnp.eye(4))
      >>> abs(round(float(jp.distill.dist_plus(t, t)), 4))
      0.0

    Reference: Huang et al., "DIST+: Knowledge Distillation From a Stronger Adaptive Teacher", 2025,
    https://ieeexplore.ieee.org/document/10938241
    """
    same_shapes(s[0], t[0])
    a, b = wide(s[0], t[0])
    logits = dist(s[1], t[1], temperature=temperature, beta=beta, gamma=gamma, eps=eps)
    of_channels = 1 - jnp.mean(pearson(a, b, -1, eps))
    of_places = 1 - jnp.mean(pearson(jnp.sum(a, -1), jnp.sum(b, -1), 0, eps))
    return logits + channels * of_channels + places * of_places


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


def hierarchical_context(
    s: Array, t: Array, *, sizes: tuple[int, ...] = (4, 2, 1)
) -> Float[Array, ""]:
    """Hierarchical context loss of knowledge review: the squared difference at several resolutions.

    Args:
      s: the student's features after fusion (`jp.distill.review_fusion`).
      t: the teacher's, of one shape, (batch, height, width, channels).
      sizes: to which both are pooled besides; those of at least the height are left out. Weights halve.

    Returns:
      A scalar, the weighted mean.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> x = jnp.ones((1, 8, 8, 2))
      >>> float(jp.distill.hierarchical_context(x, 0 * x))
      1.0

    Reference: Chen et al., "Distilling Knowledge via Knowledge Review", 2021,
    https://arxiv.org/abs/2104.09044
    """
    same_shapes(s, t)
    s, t = wide(s, t)
    total, weight, weights = jnp.mean((s - t) ** 2), 1.0, 1.0
    for size in sizes:
        if size >= s.shape[1]:
            continue
        weight /= 2
        total += weight * jnp.mean((resized(s, (size, size)) - resized(t, (size, size))) ** 2)
        weights += weight
    return total / weights


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
