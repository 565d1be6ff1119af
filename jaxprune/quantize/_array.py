"""The quantized leaf."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxprune import _checks
from jaxprune.quantize._bits import fields, pack, unpack
from jaxprune.quantize._scale import (
    from_levels,
    is_finite,
    largest_magnitude,
    reciprocal,
    scale_of,
    to_levels,
)
from jaxprune.quantize._spec import Spec, resolved
from jaxprune.quantize._views import leading_block, reshaped_scales


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "zero_point"),
    meta_fields=("spec", "length", "dtype"),
)
@dataclass(frozen=True)
class QuantizedArray:
    """An array in few bits: `(levels - zero_point) * scale`.

    A pytree node that jits, checkpoints and shards like any array. Its static fields count axes from
    the end, so `scan`, `vmap` and slices over leading axes keep it valid.

    Attributes:
      values: codes. int8 or float8 in the dense shape, or uint8 of shape `(..., ceil(n / 2))` (4
        bits) or `(..., ceil(n / 4))` (2 bits), packed along the last axis.
      scale: float, the dense shape with shared axes of size 1, groups counted on the group axis.
      zero_point: int8 like `scale`, or `None` (symmetric).
      spec: the format.
      length: size of the dense last axis; -1 for a scalar.
      dtype: dtype of the dense array.

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

    @classmethod
    def of_levels(
        cls, levels: Array, scale: Array, zero_point: Array | None, spec: Spec, dtype: Any
    ) -> "QuantizedArray":
        """From codes in the dense shape, unpacked. Inverse of `levels`."""
        values = levels if spec.format.startswith("float8") else levels.astype(jnp.int8)
        length = levels.shape[-1] if levels.ndim else -1
        if spec.width < 8:
            values = pack(values.reshape(levels.shape or (1,)), spec.width)
        return cls(values, scale, zero_point, spec, length, np.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        if self.length < 0:
            return self.values.shape[:-1] if self.spec.width < 8 else self.values.shape
        return (*self.values.shape[:-1], self.length)

    @property
    def ndim(self) -> int:
        """Number of axes of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the dense array."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(
            int(np.prod(x.shape)) * x.dtype.itemsize
            for x in (self.values, self.scale, self.zero_point)
            if x is not None
        )

    def levels(self) -> Array:
        """The codes, unpacked: int8 (nf4: indices 0 to 15) or float8, in the dense shape."""
        if self.spec.width == 8:
            return self.values
        signed = self.spec.format != "nf4"
        out = unpack(self.values, self.spec.width, abs(self.length), signed=signed)
        return out if self.length >= 0 else out[..., 0]

    def materialize(self) -> Float[Array, "..."]:
        """The dense array, of `shape` and `dtype`."""
        return from_levels(self.levels(), self.scale, self.zero_point, self.spec, self.dtype)

    def __getitem__(self, index: int | slice) -> "QuantizedArray":
        """Entries along the leading axis, still quantized; the last axis cannot be indexed so."""
        if self.ndim < 2 or not isinstance(index, (int, slice, np.integer)):
            raise TypeError(
                f"index: expected an int or a slice along the first of at least two axes, got "
                f"{index!r} for shape {self.shape}; use materialize()[...] for anything else"
            )
        n, group = self.shape[0], self.scale.shape[0]
        if self.ndim == 2 and group not in (1, n):
            raise TypeError("index: groups lie along the first axis; use materialize()[...]")
        cut = lambda x: x if x is None or x.shape[0] == 1 != n else x[index]
        scale, zero = cut(self.scale), cut(self.zero_point)
        if isinstance(index, (int, np.integer)) and group == 1 != n:
            scale, zero = scale[0], None if zero is None else zero[0]
        return QuantizedArray(self.values[index], scale, zero, self.spec, self.length, self.dtype)

    def astype(self, dtype: Any) -> "QuantizedArray":
        """The same codes, standing for an array of another float type."""
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"dtype: expected a float type, got {dtype}; use materialize() first")
        return replace(self, dtype=np.dtype(dtype))

    def reshape(self, *shape: Any) -> "QuantizedArray":
        """Another shape, still quantized, where each scale goes on belonging to whole axes.

        Raises:
          TypeError: codes packed in one byte, or entries of one scale, would part.
        """
        wanted = tuple(shape[0]) if len(shape) == 1 and np.ndim(shape[0]) else shape
        wanted = tuple(int(n) for n in wanted)
        packed = self.spec.width < 8
        scales = reshaped_scales(self.shape, wanted, self.scale.shape, whole_rows=packed)
        if scales is None:
            raise TypeError(
                f"reshape: {self.shape} to {wanted} would part codes of one scale or byte; "
                "use materialize().reshape(...)"
            )
        last = self.values.shape[-1] if packed else wanted[-1]
        return QuantizedArray(
            self.values.reshape(*wanted[:-1], last),
            scales(self.scale),
            None if self.zero_point is None else scales(self.zero_point),
            self.spec,
            wanted[-1],
            self.dtype,
        )

    def block(self, start: Any, size: int) -> "QuantizedArray":
        """`size` entries of the leading axis from `start` (may be traced), still quantized.

        Raises:
          TypeError: the leading axis is packed, or the block may cut through groups of one scale.
        """
        n = self.shape[0] if self.ndim > 1 else 0
        ratio = n // max(self.scale.shape[0], 1) if n else 1
        whole = isinstance(start, (int, np.integer)) and start % ratio == size % ratio == 0
        if n == 0 or not (ratio in (1, n) or whole):
            raise TypeError(f"block: cuts through groups or bytes of shape {self.shape}")
        return self.leading(start, size)

    def leading(self, start: Any, size: int) -> "QuantizedArray":
        """`block` for callers who know that it holds whole groups."""
        n = self.shape[0]
        cut = lambda y: None if y is None else leading_block(y, n, start, size)
        return replace(
            self, values=cut(self.values), scale=cut(self.scale), zero_point=cut(self.zero_point)
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


def levels_by_place(x: QuantizedArray) -> list[Levels]:
    """The codes of each place in the bytes: entry `i` of place `j` is entry `i * len(places) + j` along
    the last axis of `x`, whose end may be padding. Cheaper than codes in order.
    """
    per = 8 // x.spec.width
    if per == 1:
        return [Levels(x.values, x.scale, x.zero_point, x.spec)]
    found = []
    for i, codes in enumerate(fields(x.values, x.spec.width, signed=x.spec.format != "nf4")):
        own = lambda y, i=i: strided(y, i, per, x.length)
        zero = None if x.zero_point is None else own(x.zero_point)
        found.append(Levels(codes, own(x.scale), zero, x.spec))
    return found


def joined_levels(x: QuantizedArray) -> Levels:
    """All codes, unpacked, in the order of `by_place` along the last axis, and padding."""
    parts = levels_by_place(x)
    if len(parts) == 1:
        return parts[0]
    shared = x.scale.shape[-1] == 1 != x.length
    join = lambda ys: ys[0] if shared else jnp.concatenate(ys, -1)
    zeros = [p.zero_point for p in parts if p.zero_point is not None]
    codes = jnp.concatenate([p.codes for p in parts], -1)
    return Levels(codes, join([p.scale for p in parts]), join(zeros) if zeros else None, x.spec)


def strided(x: Array, start: int, step: int, n: int) -> Array:
    """Every `step`-th of the entries along a last axis of `n`, which may be shared, and padding."""
    if x.shape[-1] == 1 != n:
        return x
    found = x[..., start::step]
    return jnp.pad(found, [(0, 0)] * (x.ndim - 1) + [(0, -(-n // step) - found.shape[-1])])


def by_place(x: Array, per: int, axis: int) -> Array:
    """An axis in the order of the places in bytes: entries 0, per, 2 per, …, then 1, 1 + per, …; zeros
    fill the last byte.
    """
    if per == 1:
        return x
    axis %= x.ndim
    pads = [(0, -n % per if i == axis else 0) for i, n in enumerate(x.shape)]
    x = jnp.pad(x, pads)
    n = x.shape[axis]
    return jnp.concatenate([jax.lax.slice_in_dim(x, i, n, per, axis) for i in range(per)], axis)


def quantize(path: str, x: Float[Array, "..."], spec: Spec) -> tuple[QuantizedArray, Array]:
    """One leaf quantized, and whether all of it is finite. Inverse, up to rounding: `materialize`."""
    x = jnp.asarray(x)
    spec = resolved(spec, path, x.shape)
    scale, zero = scale_of(x, spec)
    values = _encode(x, reciprocal(scale), zero, spec)
    stored = None if zero is None else zero.astype(jnp.int8)
    length = x.shape[-1] if x.ndim else -1
    return QuantizedArray(values, scale, stored, spec, length, np.dtype(x.dtype)), is_finite(scale)


def quantize_with(
    x: Float[Array, "..."], scale: Array, zero: Array | None, spec: Spec
) -> QuantizedArray:
    """An array quantized by a known scale and zero point; what lies beyond the range is clipped."""
    levels = to_levels(x, reciprocal(scale), zero, spec)
    values = levels if spec.width == 8 else pack(levels.reshape(x.shape or (1,)), spec.width)
    stored = None if zero is None else zero.astype(jnp.int8)
    length = x.shape[-1] if x.ndim else -1
    return QuantizedArray(values, scale, stored, spec, length, np.dtype(x.dtype))


@partial(jax.jit, static_argnums=3)
def _encode(x: Array, factors: tuple[Array, Array], zero: Array | None, spec: Spec) -> Array:
    levels = to_levels(x, factors, zero, spec, in_range=True)
    return levels if spec.width == 8 else pack(levels.reshape(x.shape or (1,)), spec.width)


def refuse_non_finite(paths: list[str], flags: list[Array]) -> None:
    """Raises `ValueError` naming the leaves with a NaN or an infinity; traced flags pass."""
    if any(_checks.is_traced(flag) for flag in flags):
        return
    bad = [path for path, ok in zip(paths, jax.device_get(flags), strict=True) if not ok]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(
            f"params: leaf {bad[0]!r}{more} holds NaN or infinity and cannot be quantized; "
            "look for a diverged training step, or leave it out with where= or rules="
        )
