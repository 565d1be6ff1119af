"""The quantized leaf."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxprune import _bits, _checks, _leaves
from jaxprune._types import CompressedLeaf
from jaxprune.quantize._scale import (
    from_levels,
    is_finite,
    largest_magnitude,
    reciprocal,
    scale_of,
    to_levels,
)
from jaxprune.quantize._spec import Spec, fitted, group_length
from jaxprune.quantize._views import leading_block, reshaped_scales


@_leaves.register(data=("values", "scale", "zero_point"), meta=("spec", "length", "dtype", "axis"))
@dataclass(frozen=True)
class QuantizedArray(CompressedLeaf):
    """An array in few bits: `(levels - zero_point) * scale`.

    A pytree node that jits, checkpoints and shards like any array. Its static fields count axes from
    the end, so `scan`, `vmap` and slices over leading axes keep it valid.

    Attributes:
      values: codes. int8 or float8 in the dense shape, or uint8 with several codes per byte along one
        axis (see `_bits`).
      scale: float, the dense shape with shared axes of size 1, groups counted on the group axis.
      zero_point: int8 like `scale`, or `None` (symmetric).
      spec: the format.
      length: size of the dense array along the packed axis; -1 for a scalar.
      dtype: dtype of the dense array.
      axis: the packed axis, counted from the end: -2 where the last is too short to fill bytes.

    Example:
      >>> q = jp.quantize_tree({"w": jnp.array([[1.0, -0.5], [0.25, 2.0]])}, bits=8)["w"]
      >>> q.shape, q.values.dtype, q.nbytes
      ((2, 2), dtype('int8'), 12)
      >>> bool(jnp.allclose(q.materialize(), jnp.array([[1.0, -0.5], [0.25, 2.0]]), atol=0.01))
      True
    """

    values: Array
    scale: Float[Array, "..."]
    zero_point: Int8[Array, "..."] | None
    spec: Spec
    length: int
    dtype: Any
    axis: int = -1

    @classmethod
    def of_levels(
        cls, levels: Array, scale: Array, zero_point: Array | None, spec: Spec, dtype: Any
    ) -> "QuantizedArray":
        """From codes in the dense shape, unpacked. Inverse of `levels`."""
        axis = _bits.packing_axis(levels.shape, spec.width)
        length = levels.shape[axis] if levels.ndim else -1
        if spec.width < 8:
            values = _bits.pack(levels.reshape(levels.shape or (1,)), spec.width, axis)
        else:
            values = levels if spec.format.startswith("float8") else levels.astype(jnp.int8)
        return cls(values, scale, zero_point, spec, length, np.dtype(dtype), axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        if self.length < 0:
            return self.values.shape[:-1] if self.spec.width < 8 else self.values.shape
        shape = list(self.values.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def group_length(self) -> int:
        """Entries of one scale along the leading axis; the last group may have fewer."""
        n, count = self.shape[0], self.scale.shape[0]
        return max(group_length(n, count, self.spec, -self.ndim), 1)

    def levels(self) -> Array:
        """The codes, unpacked: int8 (nf4: indices 0 to 15) or float8, in the dense shape."""
        if self.spec.width == 8:
            return self.values
        width, signed = self.spec.width, self.spec.format != "nf4"
        out = _bits.unpack(self.values, width, abs(self.length), signed=signed, axis=self.axis)
        out = out.astype(jnp.int8)
        return out if self.length >= 0 else out[..., 0]

    def materialize(self) -> Float[Array, "..."]:
        """The dense array, of `shape` and `dtype`."""
        return from_levels(self.levels(), self.scale, self.zero_point, self.spec, self.dtype)

    def __getitem__(self, index: int | slice) -> "QuantizedArray":
        """Entries along the leading axis, still quantized; a packed axis cannot be indexed so."""
        whole = self.ndim + self.axis > 0 or (self.ndim > 1 and self.spec.width == 8)
        if not whole or not isinstance(index, (int, slice, np.integer)):
            raise TypeError(
                f"index: expected an int or a slice along the first of at least two axes, got "
                f"{index!r} for shape {self.shape}; use materialize()[...] for anything else"
            )
        n, group = self.shape[0], self.scale.shape[0]
        if group not in (1, n):
            raise TypeError("index: groups lie along the first axis; use materialize()[...]")
        cut = lambda x: x if x is None or x.shape[0] == 1 != n else x[index]
        scale, zero = cut(self.scale), cut(self.zero_point)
        if isinstance(index, (int, np.integer)) and group == 1 != n:
            scale, zero = scale[0], None if zero is None else zero[0]
        return replace(self, values=self.values[index], scale=scale, zero_point=zero)

    def reshape(self, *shape: Any) -> "QuantizedArray":
        """Another shape, still quantized, where each scale goes on belonging to whole axes.

        Raises:
          TypeError: codes packed in one byte, or entries of one scale, would part.
        """
        wanted = tuple(shape[0]) if len(shape) == 1 and np.ndim(shape[0]) else shape
        wanted = tuple(int(n) for n in wanted)
        kept = -self.axis if self.spec.width < 8 else 0  # last axes that stay as they are
        scales = reshaped_scales(self.shape, wanted, self.scale.shape, kept=kept)
        if scales is None:
            raise TypeError(
                f"reshape: {self.shape} to {wanted} would part codes of one scale or byte; "
                "use materialize().reshape(...)"
            )
        cut = len(wanted) - kept
        values = self.values.reshape(*wanted[:cut], *self.values.shape[self.ndim - kept :])
        zero = None if self.zero_point is None else scales(self.zero_point)
        return replace(
            self,
            values=values,
            scale=scales(self.scale),
            zero_point=zero,
            length=wanted[self.axis] if kept else wanted[-1],
            axis=self.axis if kept else -1,
        )

    def block(self, start: Any, size: int) -> "QuantizedArray":
        """`size` entries of the leading axis from `start` (may be traced), still quantized.

        Raises:
          TypeError: the leading axis is packed, or the block may cut through groups of one scale.
        """
        packed = self.spec.width < 8 and self.ndim + self.axis == 0
        n = self.shape[0] if self.ndim > 1 and not packed else 0
        ratio = self.group_length if n else 1
        known = isinstance(start, (int, np.integer))
        whole = known and start % ratio == 0 and (size % ratio == 0 or start + size == n)
        if n == 0 or not (ratio in (1, n) or whole):
            raise TypeError(f"block: cuts through groups or bytes of shape {self.shape}")
        return self.leading(start, size)

    def check(self) -> None:
        """See `CompressedLeaf`; the bytes of packed codes are counted."""
        super().check()
        per = 8 // self.spec.width
        wanted = -(-abs(self.length) // per)
        if per > 1 and (self.values.shape[self.axis] != wanted or self.values.dtype != jnp.uint8):
            raise ValueError(f"{abs(self.length)} codes of {self.spec.width} bits in other bytes")

    def leading(self, start: Any, size: int) -> "QuantizedArray":
        """`block` for callers who know that it holds whole groups."""
        n, length = self.shape[0], self.group_length
        cut = lambda y: None if y is None else leading_block(y, n, start, size, length)
        return replace(
            self,
            values=leading_block(self.values, n, start, size),
            scale=cut(self.scale),
            zero_point=cut(self.zero_point),
            length=self.length if self.ndim + self.axis else size,
        )


def largest_values(x: QuantizedArray, axes: tuple[int, ...]) -> Float[Array, "..."]:
    """A bound of the absolute values along some axes, which stay with size 1; others may have it too."""
    zero = None if x.zero_point is None else x.zero_point.astype(x.scale.dtype)
    bound = largest_magnitude(x.scale, zero, x.spec, x.shape).astype(jnp.float32)
    return jnp.max(bound, axes, keepdims=True)


class Levels(NamedTuple):
    """Codes one by one, each in a byte of its own, with what they mean.

    Attributes:
      codes: int8, float8, or the bits of float8 as uint8.
      scale, zero_point: as in `QuantizedArray`.
      spec: the format.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    spec: Spec

    def values(self) -> Float[Array, "..."]:
        """What they stand for, in float32."""
        return from_levels(self.codes, self.scale, self.zero_point, self.spec, jnp.dtype("float32"))


def level_fields(x: QuantizedArray) -> list[Array]:
    """The codes of each place in the bytes, int8, with padding; side by side they are in order."""
    if x.spec.width == 8:
        return [x.values]
    found = _bits.fields(x.values, x.spec.width, signed=x.spec.format != "nf4")
    return [codes.astype(jnp.int8) for codes in found]


def quantize(path: str, x: Float[Array, "..."], spec: Spec) -> tuple[QuantizedArray, Array]:
    """One leaf quantized, and whether all of it is finite. Inverse, up to rounding: `materialize`."""
    x = jnp.asarray(x)
    spec = fitted(spec, path, x.shape).spec or spec
    scale, zero = scale_of(x, spec)
    return _quantized(x, scale, zero, spec, True), is_finite(scale)


def quantize_with(
    x: Float[Array, "..."], scale: Array, zero: Array | None, spec: Spec
) -> QuantizedArray:
    """An array quantized by a known scale and zero point; what lies beyond the range is clipped."""
    return _quantized(x, scale, zero, spec, False)


def _quantized(
    x: Array, scale: Array, zero: Array | None, spec: Spec, in_range: bool
) -> QuantizedArray:
    axis = _bits.packing_axis(x.shape, spec.width)
    values = _encode(x, reciprocal(scale), zero, spec, in_range, axis)
    stored = None if zero is None else jnp.round(zero).astype(jnp.int8)
    length = x.shape[axis] if x.ndim else -1
    return QuantizedArray(values, scale, stored, spec, length, np.dtype(x.dtype), axis)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _encode(
    x: Array,
    factors: tuple[Array, Array],
    zero: Array | None,
    spec: Spec,
    in_range: bool,
    axis: int,
) -> Array:
    levels = to_levels(x, factors, zero, spec, in_range=in_range)
    return (
        levels if spec.width == 8 else _bits.pack(levels.reshape(x.shape or (1,)), spec.width, axis)
    )


def refuse_non_finite(paths: list[str], flags: list[Array]) -> None:
    """Raises `ValueError` naming the leaves with a NaN or an infinity; traced flags pass."""
    bad = _checks.flagged(paths, flags, value=False)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(
            f"params: leaf {bad[0]!r}{more} holds NaN or infinity and cannot be quantized; "
            "look for a diverged training step, or leave it out with where= or rules="
        )
