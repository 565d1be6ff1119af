"""Ways to multiply rows of floats by a quantized matrix.

Each takes `x` of shape (rows, k) and the matrix as `Codes`, and gives (rows, n) in float32. With one
scale per column of the product the scale is applied to the result; with one per contracted index, to `x`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxprune.quantize import QuantizedArray

_STEPS = 254.0  # steps of the second plane within one of the first
_FEW = 2  # integer products of fewer rows run slower than of these


class Codes(NamedTuple):
    """A matrix in few bits, as a product reads it.

    Attributes:
      parts: integers or float8: (k, n) or, where `across`, (n, k); packed ones in several parts, whose
        entries alternate along the last axis.
      before: scale of each contracted index, (k,), or `None`.
      after: scale of each result, (n,) or a scalar, or `None`.
      zero: zero point of each result, (n,), or `None`.
      across: the contracted axis is the last.
      size: entries along the last axis, padding aside.
    """

    parts: list[Array]
    before: Array | None
    after: Array | None
    zero: Array | None
    across: bool
    size: int


def codes_of(array: QuantizedArray, *, across: bool) -> Codes | str:
    """A quantized matrix as codes, or the reason why its scales do not factor out of the product."""
    if array.spec.format == "nf4":
        return "nf4 codes are no numbers"
    scale = array.scale.astype(jnp.float32)
    zero = None if array.zero_point is None else array.zero_point.astype(jnp.float32)
    if scale.shape[0] > 1:
        return "scales differ within groups of the contracted axis"
    if across and zero is not None:
        return "zero points differ along the contracted axis"
    along = scale.shape[1] > 1
    return Codes(
        array.level_parts(),
        scale[0] if across and along else None,
        None if across and along else scale[0],
        None if zero is None else zero[0],
        across,
        array.length,
    )


def _product(x: Array, parts: list[Array], across: bool, size: int, dtype: jnp.dtype) -> Array:
    """`x` times the levels, accumulated in `dtype`."""
    contract = (((1,), (1 if across else 0,)), ((), ()))
    dot = lambda a, b: jax.lax.dot_general(a, b, contract, preferred_element_type=dtype)
    if len(parts) == 1:
        return dot(x, parts[0])
    if across:
        x = jnp.pad(x, ((0, 0), (0, -size % len(parts))))
        found = [dot(x[:, i :: len(parts)], part) for i, part in enumerate(parts)]
        return sum(found[1:], start=found[0])
    found = [dot(x, part) for part in parts]
    return jnp.stack(found, -1).reshape(len(x), -1)[:, :size]


def _float_product(x: Array, parts: list[Array], across: bool, size: int) -> Array:
    floats = [part.astype(jnp.float32) for part in parts]
    return _product(x, floats, across, size, jnp.dtype(jnp.float32))


def quantized_rows(x: Float[Array, "rows k"]) -> tuple[Int8[Array, "rows k"], Array]:
    """Codes of each row and its scale, (rows, 1)."""
    scale = jnp.max(jnp.abs(x), 1, keepdims=True) / 127.0
    scale = jnp.where(scale == 0, 1.0, scale)
    return jnp.round(x / scale).astype(jnp.int8), scale


def _integer_product(x: Array, parts: list[Array], across: bool, size: int) -> Array:
    padded = jnp.pad(x, ((0, max(_FEW - len(x), 0)), (0, 0)))
    found = _product(padded, parts, across, size, jnp.dtype(jnp.int32))
    return found[: len(x)].astype(jnp.float32)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _in_planes(x: Array, parts: list[Array], across: bool, size: int, planes: int) -> Array:
    """`x` times the levels, `x` in one or two 8-bit planes; its derivative is that of the product."""
    first, scale = quantized_rows(x)
    if planes == 1:
        return _integer_product(first, parts, across, size) * scale
    rest = x / scale - first.astype(jnp.float32)
    second = jnp.round(rest * _STEPS).astype(jnp.int8)
    both = _integer_product(jnp.concatenate([first, second]), parts, across, size)
    high, low = jnp.split(both, 2)
    return (high + low / _STEPS) * scale


@_in_planes.defjvp
def _in_planes_jvp(
    across: bool, size: int, planes: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    (x, parts), (x_dot, _) = primals, tangents
    y = _in_planes(x, parts, across, size, planes)
    return y, _float_product(x_dot, parts, across, size)


def _scaled(y: Array, x: Float[Array, "rows k"], codes: Codes) -> Float[Array, "rows n"]:
    if codes.zero is not None:
        y = y - jnp.sum(x, 1, keepdims=True) * codes.zero
    return y if codes.after is None else y * codes.after


def _before(x: Array, codes: Codes) -> Float[Array, "rows k"]:
    x = x.astype(jnp.float32)
    return x if codes.before is None else x * codes.before


def integer(x: Array, codes: Codes) -> Float[Array, "rows n"]:
    """Activations in 8 bits, one scale per row, and an integer product."""
    x = _before(x, codes)
    y = _in_planes(x, codes.parts, codes.across, codes.size, 1)
    if codes.zero is not None:  # the zero point multiplies the same rounded activations
        plane, scale = quantized_rows(x)
        x = x + jax.lax.stop_gradient(plane.astype(jnp.float32) * scale - x)
    return _scaled(y, x, codes)


def two_planes(x: Array, codes: Codes) -> Float[Array, "rows n"]:
    """Activations as the sum of two 8-bit planes, 15 bits and a sign: two integer products in one."""
    x = _before(x, codes)
    return _scaled(_in_planes(x, codes.parts, codes.across, codes.size, 2), x, codes)


def converted(x: Array, codes: Codes) -> Float[Array, "rows n"]:
    """Codes converted to floats, and a float product."""
    x = _before(x, codes)
    return _scaled(_float_product(x, codes.parts, codes.across, codes.size), x, codes)
