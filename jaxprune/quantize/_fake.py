"""Fake quantization: values on the quantized grid, gradients as if nothing had happened."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _trees
from jaxprune._types import Params, Where
from jaxprune.quantize._misfits import Misfits
from jaxprune.quantize._scale import (
    clip_range,
    from_levels,
    reciprocal,
    scale_of,
    spread,
    to_levels,
)
from jaxprune.quantize._spec import Spec
from jaxprune.quantize._tree import Rules, specs_for

_ROUNDING = 1e-6  # of the range: the largest value of a tensor is inside its own range


def fake_quantize(
    x: Float[Array, "*shape"],
    *,
    bits: int = 8,
    symmetric: bool = True,
    group_size: int | None = None,
    otherwise: str = "auto",
    dtype: Any = None,
    granularity: str = "channel",
    scale: Float[Array, "..."] | float | None = None,
    zero_point: Array | float | None = None,
    key: jax.Array | None = None,
) -> Float[Array, "*shape"]:
    """`x` rounded to the values that its quantized form would have.

    The gradient is that of a clip: 1 where `x` lies in the representable range, 0 outside
    (straight-through). Without a given scale the range is that of `x`, and nothing is clipped. Scale
    and zero point get no gradient.

    Args:
      x: floating array.
      bits, symmetric, group_size, otherwise, dtype, granularity: see `jp.quantize.Spec`.
      scale: step size, broadcastable against `x` (groups counted on the group axis); by default
        from the range of `x`.
      zero_point: the level of 0, used with a given `scale` if not symmetric; default 0.
      key: a PRNG key: rounds up or down by chance, right in the mean (integers only).

    Returns:
      Array like `x`, equal to `jp.quantize_tree(x, …).materialize()`.

    Raises:
      ValueError: an unsupported format, or a group size that does not divide `x` where
        `otherwise="error"`.
      TypeError: `x` is not floating.

    Warns:
      UserWarning: a group size that does not divide `x`, and what was done.

    Example:
      >>> x = jnp.array([0.0, 0.3, 0.6, 5.0])
      >>> jp.fake_quantize(x, bits=4, scale=0.25).tolist()
      [0.0, 0.25, 0.5, 1.75]
      >>> jax.grad(lambda x: jp.fake_quantize(x, bits=4, scale=0.25).sum())(x).tolist()
      [1.0, 1.0, 1.0, 0.0]

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, https://arxiv.org/abs/1712.05877
    """
    spec = Spec(
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        otherwise=otherwise,
        dtype=dtype,
        granularity=granularity,
    )
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"x: expected floats, got {jnp.result_type(x)}")
    x = jnp.asarray(x)
    misfits = Misfits()
    known = misfits.fit(spec, "x", x)
    misfits.tell()
    return x if known is None else _fake(x, known, scale, zero_point, key)


def _fake(x: Array, spec: Spec, scale: Any, zero_point: Any, key: jax.Array | None = None) -> Array:
    if scale is None:
        scale, zero = scale_of(jax.lax.stop_gradient(x), spec)
        through = x
    else:
        working = jnp.promote_types(jnp.float32, x.dtype)
        scale = jax.lax.stop_gradient(_with_rank(jnp.asarray(scale, working), x.ndim))
        zero = None
        if not spec.symmetric:
            given = jnp.zeros((), working) if zero_point is None else zero_point
            zero = jax.lax.stop_gradient(_with_rank(jnp.asarray(given, working), x.ndim))
        low, high = clip_range(scale, zero, spec, x.shape)
        slack = _ROUNDING * (high - low)
        inside = (x >= low - slack) & (x <= high + slack)
        through = jnp.where(inside, x, jax.lax.stop_gradient(x))
    before = x if key is None else _shaken(x, scale, spec, key)
    levels = to_levels(before, reciprocal(scale), zero, spec)
    rounded = from_levels(levels, scale, zero, spec, x.dtype)
    # the values are `rounded` exactly, the gradient is that of `through`
    return jax.lax.stop_gradient(rounded) + (through - jax.lax.stop_gradient(through))


def _shaken(x: Array, scale: Array, spec: Spec, key: jax.Array) -> Array:
    """`x` moved by up to half a step, so that rounding it is right in the mean; zeros stay."""
    if spec.format in ("nf4", "float8_e4m3fn"):
        raise ValueError(f"key: random rounding needs equal steps, and {spec.format} has none")
    working = jnp.promote_types(jnp.float32, x.dtype)
    moved = x + (jax.random.uniform(key, x.shape, working) - 0.5) * spread(scale, x.shape, spec)
    return jnp.where(x == 0, x, moved)


def _with_rank(x: Array, ndim: int) -> Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def fake_quantize_tree(
    params: Params,
    bits: int = 8,
    *,
    symmetric: bool = True,
    group_size: int | None = None,
    otherwise: str = "auto",
    dtype: Any = None,
    granularity: str = "channel",
    rules: Rules | None = None,
    uses: Any = None,
    where: Where = None,
    key: jax.Array | None = None,
) -> Params:
    """`fake_quantize` on every selected leaf: put it before the model to train for quantization.

    Args:
      params: any tree of arrays.
      bits, symmetric, group_size, otherwise, dtype, granularity: see `jp.quantize.Spec`.
      rules, uses, where: see `jp.quantize_tree`.
      key: a PRNG key for random rounding; each leaf draws from a key of its own.

    Returns:
      Tree like `params`, dense, with straight-through gradients.

    Raises:
      ValueError: see `jp.quantize_tree`.

    Warns:
      UserWarning: see `jp.quantize_tree`.

    Example:
      >>> params = {"w": jnp.array([[1.0, 0.4], [-0.6, 0.1]])}
      >>> loss = lambda p: jnp.sum(jp.fake_quantize_tree(p, bits=2)["w"])
      >>> jax.grad(loss)(params)["w"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    base = Spec(
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        otherwise=otherwise,
        dtype=dtype,
        granularity=granularity,
    )
    misfits = Misfits()
    specs = specs_for(params, base, rules, where, uses, misfits)
    paths, leaves, treedef = _trees.flatten(params)
    specs = [
        None if spec is None else misfits.fit(spec, path, leaf)
        for path, leaf, spec in zip(paths, leaves, specs, strict=True)
    ]
    misfits.tell()
    keys = [None] * len(leaves) if key is None else list(jax.random.split(key, len(leaves)))
    return treedef.unflatten(
        leaf if spec is None else _fake(_trees.dense(leaf), spec, None, None, own)
        for leaf, spec, own in zip(leaves, specs, keys, strict=True)
    )
