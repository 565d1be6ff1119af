"""What brings a student's features to the teacher's size: pairs of `init` and `apply`, pure functions.

`params = projector.init(key)` are trained with the student; `projector.apply(params, x)` gives
features of the teacher's size. They are thrown away after training.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks

_CONV = ("NHWC", "HWIO", "NHWC")


class Projector(NamedTuple):
    """A learnable map.

    Attributes:
      init: `key -> params`.
      apply: `(params, x, ...) -> features`.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., Any]


def _scaled(key: jax.Array, shape: tuple[int, ...]) -> Array:
    fan_in = 1
    for n in shape[:-1]:
        fan_in *= n
    return jax.random.normal(key, shape) / fan_in**0.5


def dense_projector(n_in: int, n_out: int, *, hidden: int | None = None) -> Projector:
    """A linear map of the last axis, or one with a hidden layer and a ReLU.

    Args:
      n_in, n_out: features of student and teacher.
      hidden: of the hidden layer, or none.

    Returns:
      `init(key)` and `apply(params, x)`.

    Raises:
      ValueError: sizes below 1.

    Example:
      >>> projector = jp.distill.dense_projector(4, 8)
      >>> projector.apply(projector.init(jax.random.key(0)), jnp.ones((2, 4))).shape
      (2, 8)
    """
    sizes = [n_in, n_out] if hidden is None else [n_in, hidden, n_out]
    for n in sizes:
        _checks.positive_int("features", n)

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [{"kernel": _scaled(k, (a, b)), "bias": jnp.zeros(b)} for k, a, b in pairs]

    def apply(params: Any, x: Float[Array, "... features"]) -> Array:
        for i, layer in enumerate(params):
            x = x @ layer["kernel"].astype(x.dtype) + layer["bias"].astype(x.dtype)
            x = jax.nn.relu(x) if i < len(params) - 1 else x
        return x

    return Projector(init, apply)


def conv_projector(n_in: int, n_out: int, *, size: int = 1, stride: int = 1) -> Projector:
    """A convolution of images, `"SAME"` padded.

    Args:
      n_in, n_out: channels of student and teacher.
      size: of the kernel.
      stride: of the convolution.

    Returns:
      `init(key)` and `apply(params, x)`.

    Raises:
      ValueError: sizes below 1.

    Example:
      >>> projector = jp.distill.conv_projector(4, 8)
      >>> projector.apply(projector.init(jax.random.key(0)), jnp.ones((2, 5, 5, 4))).shape
      (2, 5, 5, 8)
    """
    for n in (n_in, n_out, size, stride):
        _checks.positive_int("size", n)
    init = lambda key: {"kernel": _scaled(key, (size, size, n_in, n_out)), "bias": jnp.zeros(n_out)}

    def apply(params: Any, x: Float[Array, "b h w c"]) -> Array:
        return _conv(x, params["kernel"], stride) + params["bias"].astype(x.dtype)

    return Projector(init, apply)


def _conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), "SAME", dimension_numbers=_CONV
    )


def vid_regressor(
    n_in: int, n_out: int, *, hidden: int | None = None, eps: float = 1e-5
) -> Projector:
    """What `vid` needs: three 1 x 1 convolutions for the mean, and a variance per channel.

    Args:
      n_in, n_out: channels of student and teacher.
      hidden: channels between; by default the teacher's.
      eps: least variance.

    Returns:
      `init(key)` and `apply(params, x) -> (mean, var)`.

    Raises:
      ValueError: sizes below 1.

    Example:
      >>> regressor = jp.distill.vid_regressor(4, 8)
      >>> mean, var = regressor.apply(regressor.init(jax.random.key(0)), jnp.ones((2, 5, 5, 4)))
      >>> mean.shape, var.shape, round(float(var[0]), 3)
      ((2, 5, 5, 8), (8,), 5.0)

    Reference: Ahn et al., 2019, https://arxiv.org/abs/1904.05835
    """
    middle = n_out if hidden is None else hidden
    sizes = [n_in, middle, middle, n_out]
    layers = [dense_projector(a, b) for a, b in pairwise(sizes)]

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(layers))
        start = jnp.full(n_out, jnp.log(jnp.expm1(5.0 - eps)))
        return {"layers": [p.init(k) for p, k in zip(layers, keys, strict=True)], "scale": start}

    def apply(params: Any, x: Array) -> tuple[Array, Array]:
        for i, (layer, own) in enumerate(zip(layers, params["layers"], strict=True)):
            x = layer.apply(own, x)
            x = jax.nn.relu(x) if i < len(layers) - 1 else x
        return x, jax.nn.softplus(params["scale"]) + eps

    return Projector(init, apply)


def mgd_generator(n_in: int, n_out: int, *, masked: float = 0.5) -> Projector:
    """What `mgd` needs: a 1 x 1 alignment, random masking of places, and two 3 x 3 convolutions.

    Args:
      n_in, n_out: channels of student and teacher.
      masked: fraction of places that are masked, in [0, 1].

    Returns:
      `init(key)` and `apply(params, x, key)`.

    Raises:
      ValueError: sizes below 1, a fraction out of range.

    Example:
      >>> generator = jp.distill.mgd_generator(4, 8)
      >>> params = generator.init(jax.random.key(0))
      >>> generator.apply(params, jnp.ones((2, 5, 5, 4)), jax.random.key(1)).shape
      (2, 5, 5, 8)

    Reference: Yang et al., 2022, https://arxiv.org/abs/2205.01529
    """
    _checks.fraction("masked", masked)
    align = conv_projector(n_in, n_out)
    first, second = (conv_projector(n_out, n_out, size=3) for _ in range(2))

    def init(key: jax.Array) -> Any:
        parts = zip(
            ("align", "first", "second"),
            (align, first, second),
            jax.random.split(key, 3),
            strict=True,
        )
        return {name: part.init(k) for name, part, k in parts}

    def apply(params: Any, x: Array, key: jax.Array) -> Array:
        x = align.apply(params["align"], x)
        keep = jax.random.uniform(key, (*x.shape[:3], 1)) >= masked
        x = jax.nn.relu(first.apply(params["first"], jnp.where(keep, x, 0)))
        return second.apply(params["second"], x)

    return Projector(init, apply)


def review_fusion(n_in: int, middle: int, n_out: int, *, fuse: bool = True) -> Projector:
    """Knowledge review's attention-based fusion of one level with what came from the deeper one.

    Args:
      n_in: channels of the student's level.
      middle: channels in which levels are fused, the same on all.
      n_out: channels of the teacher's level.
      fuse: False for the deepest level, which has nothing to fuse with.

    Returns:
      `init(key)` and `apply(params, x, deeper, size) -> (features, fused)`: features for
      `hierarchical_context` of the teacher's (height, width) `size`, and what the next level fuses with
      (`deeper`, or `None`).

    Raises:
      ValueError: sizes below 1.

    Example:
      >>> level = jp.distill.review_fusion(4, 6, 8, fuse=False)
      >>> params = level.init(jax.random.key(0))
      >>> features, fused = level.apply(params, jnp.ones((2, 4, 4, 4)), None, (4, 4))
      >>> features.shape, fused.shape
      ((2, 4, 4, 8), (2, 4, 4, 6))

    Reference: Chen et al., 2021, https://arxiv.org/abs/2104.09044
    """
    inwards, outwards = conv_projector(n_in, middle), conv_projector(middle, n_out, size=3)
    attention = conv_projector(2 * middle, 2)

    def init(key: jax.Array) -> Any:
        one, two, three = jax.random.split(key, 3)
        params = {"in": inwards.init(one), "out": outwards.init(two)}
        return {**params, "attention": attention.init(three)} if fuse else params

    def apply(
        params: Any, x: Array, deeper: Array | None, size: tuple[int, int]
    ) -> tuple[Array, Array]:
        x = inwards.apply(params["in"], x)
        if fuse:
            assert deeper is not None, "a level that fuses needs the deeper one"
            deeper = jax.image.resize(deeper, (*x.shape[:3], deeper.shape[-1]), "nearest")
            share = jax.nn.sigmoid(
                attention.apply(params["attention"], jnp.concatenate([x, deeper], -1))
            )
            x = x * share[..., :1] + deeper * share[..., 1:]
        fused = x
        if x.shape[1:3] != tuple(size):
            x = jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "nearest")
        return outwards.apply(params["out"], x), fused

    return Projector(init, apply)
