"""What multiplies a compressed weight, as a product reads it: in 8-bit planes, or rounded."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.program import sized
from jaxprune.quantize import DynamicInput, InputScale

_TOGETHER = 512
STEPS = 254.0  # steps of the second plane within one of the first


class Planes(NamedTuple):
    """Activations as `(first plane + second plane / STEPS - zero) * scale`.

    Attributes:
      codes: int8 arrays of one or more planes each, (planes, batch…, rows, contracted…).
      scale: (batch…, rows, 1…), or a scalar.
      zero: a scalar, or `None`.
    """

    codes: list[Array]
    scale: Array
    zero: Array | None


def row_scale(x: Float[Array, "..."], axes: tuple[int, ...], top: float) -> Array:
    """A scale for each row, such that its largest entry becomes `top`; 1 for a row of zeros."""
    scale = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0) / top
    return jnp.where(scale == 0, 1.0, scale)


def in_planes(x: Float[Array, "..."], axes: tuple[int, ...], count: int) -> Planes:
    """Rows in one or two 8-bit planes, with a scale for each; `axes` are the contracted ones."""
    scale = row_scale(x, axes, 127.0)
    ratio = x / scale
    first = jnp.round(ratio)
    codes = [first[None]]
    if count == 2:
        codes.append(jnp.round((ratio - first) * STEPS)[None])
    codes = [plane.astype(jnp.int8) for plane in codes]
    rows = sized(x.shape[axes[0] - 1]) if axes else 1
    # few rows multiply faster together; putting many together costs more than it saves
    return Planes([jnp.concatenate(codes)] if rows < _TOGETHER else codes, scale, None)


def with_known_scale(x: Float[Array, "..."], known: InputScale) -> Planes:
    """Activations in one plane, by a scale known beforehand."""
    return Planes([known.codes(x)[None]], known.scale, known.zero_point)


How = InputScale | DynamicInput | None
"""How activations are quantized."""


def rounded(x: Float[Array, "..."], axes: tuple[int, ...], how: How) -> Array:
    """The activations that the codes stand for; `axes` share a dynamic scale. Gradients pass as
    through a clip.
    """
    if how is None:
        return x
    if isinstance(how, InputScale):
        return how.rounded(x)
    if how.dtype == "int8":
        scale = row_scale(x, axes, 127.0)
        found = jnp.round(x / scale) * scale
    else:
        scale = row_scale(x, axes, float(jnp.finfo(jnp.float8_e4m3fn).max))
        found = (x / scale).astype(jnp.float8_e4m3fn).astype(x.dtype) * scale
    return x + jax.lax.stop_gradient(found - x)
