"""What multiplies a compressed weight: rounded, or split into a high and a low int8 part.

A value is `(high + low / STEPS) * scale`, 15 bits and a sign of the largest of its row. Where the rest of
a row is far smaller (outliers), or is not finite, that is too coarse: `is_resolved` tells.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune._trees import is_few
from jaxprune.quantize import DynamicInput, InputScale

_TOGETHER = 512
STEPS = 254.0  # steps of the low part within one of the high one
TOP = 127.0
# of magnitudes whose largest is 127, clipped so that a few do not make up for all others
LEAST = 5.0
CLIP = 16.0
# rms of results over what activations and weights let expect, 1 where they are independent
LEAST_REACH = 0.3
LEAST_RESULTS = 2.0  # as large as the largest: one alone may be small by chance, and its error not
MOST_SPREAD = 52.0  # largest over rms, of a row of activations times that of all results
# errors are about 9e-6 of the latter, so below 5e-4 of the rms of results


class Int8Split(NamedTuple):
    """Activations as `(high + low / STEPS - zero) * scale`.

    Attributes:
      codes: int8 arrays of one or more parts each, (parts, batch…, rows, contracted…).
      scale: (batch…, rows, 1…), or a scalar.
      zero: a scalar, or `None`.
    """

    codes: list[Array]
    scale: Array
    zero: Array | None


def row_scale(x: Float[Array, "..."], axes: tuple[int, ...], top: float) -> Array:
    """A scale for each row, such that its largest entry becomes `top`; 1 for a row of zeros, and any for
    one with NaN or infinity.
    """
    scale = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0) / top
    return jnp.where(scale == 0, 1.0, scale)


def int8_split(x: Float[Array, "..."], axes: tuple[int, ...], parts: int) -> Int8Split:
    """Rows in one or two int8 parts, with a scale for each; `axes` are the contracted ones."""
    scale = row_scale(x, axes, TOP)
    codes = [part[None] for part in hi_lo(x / scale)[:parts]]
    rows = x.shape[axes[0] - 1] if axes else 1
    # few rows multiply faster together; putting many together costs more than it saves
    return Int8Split(
        [jnp.concatenate(codes)] if is_few(rows, _TOGETHER - 1) else codes, scale, None
    )


def hi_lo(ratio: Array) -> tuple[Array, Array]:
    """Numbers in [-127, 127] as whole ones, and what is left in units of 1 / STEPS, as int8."""
    high = jnp.round(ratio)
    low = jnp.round((ratio - high) * STEPS)
    return high.astype(jnp.int8), low.astype(jnp.int8)


def is_resolved(x: Float[Array, "..."], axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Whether two int8 parts resolve every row: all is finite, and no few entries dwarf the others; and
    the largest ratio of a row's largest entry to its rms, less where rows are zeros.
    """
    ratio = jnp.abs(x) / row_scale(x, axes, TOP)
    squares = jnp.sum(jnp.square(ratio), axes)
    used = squares != 0  # rows of zeros, as padding is, are exact
    peak = jnp.max(jnp.where(used, 1.0 / jnp.where(used, squares, 1.0), 0.0), initial=0.0)
    peak *= math.prod(x.shape[i] for i in axes) * jnp.mean(used.astype(x.dtype))
    resolved = jnp.all(jnp.sum(excess(ratio), axes) >= 0)
    return all_mapped(resolved), TOP * jnp.sqrt(peak)


def excess(ratio: Array) -> Array:
    """How far clipped magnitudes are above the least that two int8 parts resolve; zeros are exact."""
    clipped = jnp.where(ratio > CLIP, CLIP, ratio)  # a minimum on CPU loses NaN
    return jnp.where(ratio == 0, 0.0, clipped - LEAST)


def is_even(y: Float[Array, "..."], peak: Array) -> Array:
    """Whether results are so even that errors of their largest are small beside the rms of all."""
    top, squares = jnp.square(jnp.max(jnp.abs(y), initial=0.0)), jnp.sum(jnp.square(y))
    several = squares >= LEAST_RESULTS * top
    return several & (jnp.square(peak) * y.size * top <= MOST_SPREAD**2 * squares)


def reaches(y: Float[Array, "..."], x: Float[Array, "..."], expected: Array) -> Array:
    """Whether results are as large as independent activations and weights let expect. Else what is large
    among the activations meets weights of zeros, or cancels, and the rounding of all would show.

    Args:
      y, x: results and activations.
      expected: sum over columns of the mean square of their weights.
    """
    return jnp.sum(jnp.square(y)) >= LEAST_REACH**2 * expected * jnp.sum(jnp.square(x))


@jax.custom_batching.custom_vmap
def all_mapped(flag: Array) -> Array:
    """A flag; mapped over, whether all are set, so that `cond` stays a branch."""
    return flag


@all_mapped.def_vmap
def _all_mapped(size: int, batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return jnp.all(flag), False


def with_known_scale(x: Float[Array, "..."], known: InputScale) -> Int8Split:
    """Activations in one part, by a scale known beforehand."""
    zero = None if known.zero_point is None else known.zero
    return Int8Split([known.codes(x)[None]], known.step, zero)


How = InputScale | DynamicInput | None
"""How activations are quantized."""


def rounded(x: Float[Array, "..."], axes: tuple[int, ...], how: How) -> Array:
    """The activations that the codes stand for; `axes` share a dynamic scale. Gradients pass as
    through a clip. Rows that are not finite stay as they are.
    """
    if how is None:
        return x
    if isinstance(how, InputScale):
        return how.rounded(x)
    if how.dtype == "int8":
        scale = row_scale(x, axes, TOP)
        found = jnp.round(x / scale) * scale
    else:
        scale = row_scale(x, axes, float(jnp.finfo(jnp.float8_e4m3fn).max))
        found = (x / scale).astype(jnp.float8_e4m3fn).astype(x.dtype) * scale
    is_finite = jnp.isfinite(jnp.sum(0.0 * x, axes, keepdims=True))
    return x + jax.lax.stop_gradient(jnp.where(is_finite, found - x, 0.0))
