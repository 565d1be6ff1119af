"""Losses on feature maps: images (batch, height, width, channels)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune.distill._orders import dist
from jaxprune.distill._reduce import flat, normalized, safe_norm, same_shapes, wide
from jaxprune.distill._softmax import pearson

Pair = tuple[Any, Any]


def attention_transfer(s: Array, t: Array, *, method: str = "code") -> Float[Array, ""]:
    """Attention transfer: where features are large, as maps of unit length.

    The map is the mean (in the paper: sum) of squares over channels. `"code"`, as the authors' code:
    the mean squared difference; `"paper"`: the mean norm of the difference of an example.

    Args:
      s, t: (batch, height, width, channels); channels may differ.
      method: `"code"` or `"paper"`.

    Returns:
      A scalar.

    Raises:
      ValueError: batch or image sizes that differ, an unknown method.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
      >>> round(float(jp.distill.attention_transfer(x, 2 * x)), 6)
      0.0

    Reference: Zagoruyko & Komodakis, "Paying More Attention to Attention", 2017,
    https://arxiv.org/abs/1612.03928
    """
    _checks.choice("method", method, ("code", "paper"))
    _same_images(s, t)
    s, t = wide(s, t)
    over = jnp.mean if method == "code" else jnp.sum
    difference = normalized(flat(over(s * s, -1)), 1) - normalized(flat(over(t * t, -1)), 1)
    if method == "code":
        return jnp.mean(difference**2)
    return jnp.mean(safe_norm(difference, 1))


def _same_images(s: Any, t: Any) -> None:
    if s.ndim < 3 or s.shape[:-1] != t.shape[:-1]:
        raise ValueError(
            f"teacher: images of {t.shape[:-1]} (batch, height, width), the student has {s.shape[:-1]}; "
            "pool the larger with jp.distill.resized"
        )


def resized(x: Float[Array, "b h w c"], size: tuple[int, int], *, method: str = "mean") -> Array:
    """Images pooled to a size: each place is the mean (or maximum) of the bins that fall to it.

    Bins of an axis of n are `[floor(i n / m), ceil((i + 1) n / m))`, as in adaptive pooling.

    Args:
      x: (batch, height, width, channels).
      size: height and width wanted.
      method: `"mean"` or `"max"`.

    Returns:
      (batch, *size, channels).

    Raises:
      ValueError: a size below 1, or an unknown method.

    Example:
      >>> jp.distill.resized(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, :, :, 0].tolist()
      [[2.5, 4.5], [10.5, 12.5]]
    """
    _checks.choice("method", method, ("mean", "max"))
    for n in size:
        _checks.positive_int("size", n)
    for axis, m in zip((1, 2), size, strict=True):
        n = x.shape[axis]
        if n == m:
            continue
        if n % m == 0:
            split = x.reshape(*x.shape[:axis], m, n // m, *x.shape[axis + 1 :])
            x = (jnp.mean if method == "mean" else jnp.max)(split, axis + 1)
            continue
        parts = [
            jax.lax.slice_in_dim(x, i * n // m, -(-(i + 1) * n // m), axis=axis) for i in range(m)
        ]
        pool = jnp.mean if method == "mean" else jnp.max
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
    a, b = resized(a, size, method="max"), resized(b, size, method="max")
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
