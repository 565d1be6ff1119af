"""Several small integers per byte, on every backend.

Integers of 1, 2 or 4 bits lie along one axis. With `m` bytes along it, byte `i` holds the integers `i`,
`m + i`, `2 m + i`, … in its *places*, the first in the lowest bits: the integers of one place are
neighbours, and put side by side the places are in order. Other axes slice, map and shard as they are.
Integers of other widths are split into powers of two (5 = 4 + 1), each a *plane* of bytes of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Shaped, UInt8

Planes = tuple[Array, ...]


def pack(values: Shaped[Array, "..."], width: int, axis: int = -1) -> UInt8[Array, "..."]:
    """Packs integers of `width` (1, 2 or 4) bits, padded to whole bytes. Inverse of `unpack`.

    Values may be signed (two's complement) or not; only their lowest `width` bits are stored.
    """
    per, at = 8 // width, axis % values.ndim
    pads = [(0, -n % per if i == at else 0) for i, n in enumerate(values.shape)]
    parts = jnp.split(jnp.pad(values.astype(jnp.uint8), pads) & ((1 << width) - 1), per, axis=at)
    packed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        packed = packed | (part << (i * width))
    return packed


def fields(packed: UInt8[Array, "..."], width: int, *, signed: bool) -> list[Array]:
    """The integers of each place: `unpack` before they are put side by side; uint8, or int8."""
    places = range(8 // width)
    if not signed:
        return [(packed >> (i * width)) & ((1 << width) - 1) for i in places]
    # the field's sign bit moves to the byte's, and an arithmetic shift brings it back
    lifted = [packed << (8 - width - i * width) for i in places]
    return [jax.lax.bitcast_convert_type(x, jnp.int8) >> (8 - width) for x in lifted]


def unpack(
    packed: UInt8[Array, "..."], width: int, length: int, *, signed: bool, axis: int = -1
) -> Int8[Array, "..."] | UInt8[Array, "..."]:
    """The first `length` integers along the axis, int8 if `signed`, else uint8. Inverse of `pack`."""
    return _cut(fields(packed, width, signed=signed), length, axis)


def widths_of(bits: int) -> tuple[int, ...]:
    """The widths of the planes, largest first: 7 gives (4, 2, 1)."""
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def pack_planes(values: UInt8[Array, "..."], bits: int, axis: int = -1) -> Planes:
    """Planes of integers below `2 ** bits`; all padded to whole bytes. Inverse of `unpack_planes`."""
    widths, at = widths_of(bits), axis % values.ndim
    pads = [(0, -n % (8 // widths[-1]) if i == at else 0) for i, n in enumerate(values.shape)]
    rest, planes = jnp.pad(values, pads), []
    for width in widths:
        planes.append(rest if width == 8 else pack(rest, width, axis))
        rest = rest >> width if width < 8 else rest
    return tuple(planes)


def plane_fields(planes: Planes, bits: int, axis: int = -1) -> list[UInt8[Array, "..."]]:
    """The integers of each place of the first plane; side by side they are all, and padding."""
    widths = widths_of(bits)
    count, shift = 8 // widths[0], 0
    found: list[Array] = []
    for plane, width in zip(planes, widths, strict=True):
        parts = fields(plane, width, signed=False)
        each = len(parts) // count
        joined = [_joined(parts[i * each : (i + 1) * each], axis) << shift for i in range(count)]
        found = [a | b for a, b in zip(found, joined, strict=True)] if found else joined
        shift += width
    return found


def unpack_planes(planes: Planes, bits: int, length: int, axis: int = -1) -> UInt8[Array, "..."]:
    """The first `length` integers along the axis. Inverse of `pack_planes`."""
    return _cut(plane_fields(planes, bits, axis), length, axis)


def packed_length(length: int, bits: int, plane: int = 0) -> int:
    """Bytes along the packed axis of one plane."""
    widths = widths_of(bits)
    least = 8 // widths[-1]
    return -(-length // least) * least * widths[plane] // 8


def packing_axis(shape: tuple[int, ...], bits: int) -> int:
    """The axis to pack: the last, unless the one before saves more than a third of the bytes."""
    if len(shape) < 2 or 0 in shape:
        return -1
    size = lambda axis: int(np.prod(shape)) // shape[axis] * packed_length(shape[axis], bits)
    return -2 if 3 * size(-2) < 2 * size(-1) else -1


def _joined(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _cut(parts: list[Array], length: int, axis: int) -> Array:
    whole = _joined(parts, axis)
    return jax.lax.slice_in_dim(whole, 0, length, axis=axis % whole.ndim)
