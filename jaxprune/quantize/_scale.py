"""Scales and zero points, and rounding with them: array maths, no trees.

With groups, the group axis of extent `n` has `n / group_size` scales; `spread` repeats them.
What scales mean is read off their shape beside that of the codes; the spec says it only where the last
group is padded (`Spec.padded_axis`), so that the shapes leave the size of groups open.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Num

from jaxprune.quantize._spec import (
    FP8_MAX,
    NF4_BOUNDS,
    NF4_LEVELS,
    Spec,
    fitted,
    group_length,
    integer_range,
    reduced_axes,
)

Scale = Float[Array, "..."]
Zero = Num[Array, "..."]  # in integer units: float while it is computed, int8 when stored


def working_dtype(x: Array) -> jnp.dtype:
    """float32, or float64 for float64 data."""
    return jnp.promote_types(jnp.float32, x.dtype)


@partial(jax.jit, static_argnums=1)
def scale_of(x: Float[Array, "..."], spec: Spec) -> tuple[Scale, Zero | None]:
    """Scale, and zero point in integer units (symmetric: `None`), from the range of `x`.

    A group, channel or tensor of zeros gets the scale 1, an empty one too. A NaN or infinity in `x`
    shows in its scale.
    """
    x = x.astype(working_dtype(x))
    spec = fitted(spec, "x", x.shape).spec or spec
    if spec.symmetric:
        top = reduce_by(jnp.max, jnp.abs(x), spec)
        return _usable(top / _top_level(spec)), None
    low = jnp.minimum(reduce_by(jnp.min, x, spec), 0.0)
    high = jnp.maximum(reduce_by(jnp.max, x, spec), 0.0)
    least, most = integer_range(spec)
    # high - low might overflow; halving is exact, so a fused multiply-subtract changes no bit
    scale = _usable((0.5 * high - 0.5 * low) / (0.5 * (most - least)))
    return scale, jnp.round(least - low / scale)


def _top_level(spec: Spec) -> float:
    if spec.format == "nf4":
        return 1.0
    if spec.format == "float8_e4m3fn":
        return FP8_MAX
    return integer_range(spec)[1] + (0.5 if spec.full_range else 0.0)


def _usable(scale: Scale) -> Scale:
    """1 for 0, and nothing subnormal."""
    tiny = jnp.finfo(scale.dtype).tiny
    return jnp.where(scale == 0, 1.0, jnp.where(scale < tiny, tiny, scale))


def reduce_by(op: Callable[..., Array], x: Float[Array, "..."], spec: Spec) -> Scale:
    """A reduction over the entries of each scale, in the shape of the scales."""
    if spec.group_size is None:
        return op(x, axis=reduced_axes(spec, x.ndim), keepdims=True, initial=0.0)
    axis = (spec.group_axis or -1) % x.ndim
    groups = -(-x.shape[axis] // spec.group_size)
    missing = groups * spec.group_size - x.shape[axis]
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
    x = x.reshape(*x.shape[:axis], groups, spec.group_size, *x.shape[axis + 1 :])
    return op(x, axis=axis + 1, initial=0.0)


def spread(scale: Zero, shape: tuple[int, ...], spec: Spec | None = None) -> Zero:
    """Scales that broadcast against `shape`: groups repeated over their entries.

    `spec` tells of a last group that is padded.
    """
    for axis, (n, count) in enumerate(zip(shape, scale.shape, strict=True)):
        if count not in (1, n):
            scale = jnp.repeat(scale, group_length(n, count, spec, axis - len(shape)), axis=axis)
            scale = jax.lax.slice_in_dim(scale, 0, n, axis=axis)
    return scale


@jax.jit
def reciprocal(scale: Scale) -> tuple[Scale, Scale]:
    """Two factors of `1 / scale`, the first a power of two.

    A product with the reciprocal of a few scales is what compilers make of a division; written out,
    codes are the same in and out of `jit`. In one factor, that of a huge scale would be subnormal.
    """
    _, exponent = jnp.frexp(scale)
    root = jnp.ldexp(jnp.ones_like(scale), -(exponent // 2))
    return root, 1.0 / (scale * root)


def to_levels(
    x: Float[Array, "..."],
    factors: tuple[Scale, Scale],
    zero: Zero | None,
    spec: Spec,
    *,
    in_range: bool = False,
) -> Array:
    """The codes of `x`: int8 (nf4: level indices), or float8. Inverse, up to rounding: `from_levels`.

    Takes the `reciprocal` of the scale, so that a compiler cannot move its computation, cheap for a
    few scales, into the loop over all entries. `in_range` says that the scale is that of `x` itself,
    so that symmetric integers need no clip.
    """
    root, rest = (spread(factor, x.shape, spec) for factor in factors)
    ratio = (x.astype(working_dtype(x)) * root) * rest
    if spec.format == "float8_e4m3fn":
        return jnp.clip(ratio, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    if spec.format == "nf4":
        # a tie between two levels goes to the lower one
        steps = [(ratio > bound).astype(jnp.int8) for bound in NF4_BOUNDS]
        return sum(steps[1:], start=steps[0])
    if zero is not None:
        ratio = ratio + spread(zero, x.shape, spec)
    if zero is not None or spec.full_range or not in_range:
        ratio = jnp.clip(ratio, *integer_range(spec))
    return _rounded(ratio)


def _rounded(x: Float[Array, "..."]) -> Int8[Array, "..."]:
    """The nearest integers, half to even, of numbers in [-128, 127].

    Beyond 1.5 * 2^23 the float32 grid is that of the integers, so the addition rounds, and the low byte
    of the sum is the integer: cheaper than rounding and a saturating conversion.
    """
    if x.dtype != jnp.float32:
        return jnp.round(x).astype(jnp.int8)
    return jax.lax.bitcast_convert_type(x + 1.5 * 2.0**23, jnp.int32).astype(jnp.int8)


def from_levels(
    levels: Array, scale: Scale, zero: Zero | None, spec: Spec, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """The values that codes stand for, of `dtype`. Inverse, up to rounding: `to_levels`."""
    if spec.format == "nf4":
        values = _nf4_values(levels).astype(scale.dtype)
    elif spec.format == "float8_e4m3fn":
        values = _float8_values(levels).astype(scale.dtype)
    else:
        values = levels.astype(scale.dtype)
    if zero is not None:
        values = values - spread(zero.astype(scale.dtype), levels.shape, spec)
    return (values * spread(scale, levels.shape, spec)).astype(dtype)


def _nf4_values(index: Int8[Array, "..."]) -> Float[Array, "..."]:
    """The NF4 level of each index, halving the table bit by bit: selects vectorise, look-ups do not."""
    table: list[Any] = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = (index & (1 << bit)) != 0
        table = [
            jnp.where(is_set, odd, even) for even, odd in zip(table[::2], table[1::2], strict=True)
        ]
    return table[0]


def _float8_values(x: Array) -> Float[Array, "..."]:
    """What float8 codes (or their bits, as uint8) stand for.

    On CPU, where the program is lowered for one, by way of float16: its exponent has one bit more and
    another bias, subnormals included, which is several times cheaper than a conversion.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return jax.lax.platform_dependent(bits, cpu=_float8_by_float16, default=_float8_converted)


def _float8_by_float16(bits: Array) -> Float[Array, "..."]:
    wide = bits.astype(jnp.uint16)
    moved = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return jax.lax.bitcast_convert_type(moved, jnp.float16).astype(jnp.float32) * 256.0


def _float8_converted(bits: Array) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)


def clip_range(
    scale: Scale, zero: Zero | None, spec: Spec, shape: tuple[int, ...]
) -> tuple[Scale, Scale]:
    """The least and largest representable value, broadcastable against `shape`."""
    if spec.format in ("nf4", "float8_e4m3fn"):
        least, most = -_top_level(spec), _top_level(spec)
    else:
        least, most = integer_range(spec)
    offset = 0.0 if zero is None else spread(zero, shape, spec)
    full = spread(scale, shape, spec)
    return (least - offset) * full, (most - offset) * full


def largest_magnitude(scale: Scale, zero: Zero | None, spec: Spec, shape: tuple[int, ...]) -> Scale:
    """The largest absolute value that codes can stand for, broadcastable against `shape`."""
    return jnp.maximum(*(jnp.abs(end) for end in clip_range(scale, zero, spec, shape)))


@jax.jit
def is_finite(scale: Scale) -> jax.Array:
    """Whether no scale saw a NaN or an infinity."""
    return jnp.all(jnp.isfinite(scale)) if np.prod(scale.shape) else jnp.array(True)
