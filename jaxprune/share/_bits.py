"""Indices of 1 to 8 bits, truly packed.

A width is split into powers of two (5 = 4 + 1), each a *plane* of bytes of its own. A byte holds bits of
several indices along the last axis that lie far apart: with `m` bytes in a row, byte `i` holds the
indices `i`, `m + i`, `2 m + i`, … in its *places*, the first in the lowest bits. All indices of one
place are so neighbours, and put side by side they are in order. Packed indices slice, map and shard
along all other axes.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

Planes = tuple[Array, ...]


def widths_of(bits: int) -> tuple[int, ...]:
    """The widths of the planes, largest first: 7 gives (4, 2, 1)."""
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def packed(indices: UInt8[Array, "*lead n"], bits: int) -> Planes:
    """Planes of indices below `2 ** bits`; rows are padded to whole bytes of all. Inverse of
    `unpacked`.
    """
    widths = widths_of(bits)
    pad = -indices.shape[-1] % (8 // widths[-1])
    indices = jnp.pad(indices, [(0, 0)] * (indices.ndim - 1) + [(0, pad)])
    planes, shift = [], 0
    for width in widths:
        parts = jnp.split((indices >> shift) & ((1 << width) - 1), 8 // width, axis=-1)
        plane = parts[0]
        for i, part in enumerate(parts[1:], 1):
            plane = plane | (part << (i * width))
        planes.append(plane)
        shift += width
    return tuple(planes)


def places(planes: Planes, bits: int) -> list[UInt8[Array, "*lead m"]]:
    """The indices of each place of the first plane; side by side they are all, in order, and padding."""
    widths = widths_of(bits)
    count, shift = 8 // widths[0], 0
    found: list[Array] = []
    for plane, width in zip(planes, widths, strict=True):
        fields = [(plane >> (i * width)) & ((1 << width) - 1) for i in range(8 // width)]
        each = len(fields) // count
        joined = [_side_by_side(fields[i * each : (i + 1) * each]) << shift for i in range(count)]
        found = [a | b for a, b in zip(found, joined, strict=True)] if found else joined
        shift += width
    return found


def unpacked(planes: Planes, bits: int, length: int) -> UInt8[Array, "*lead n"]:
    """The first `length` indices along the last axis. Inverse of `packed`."""
    return _side_by_side(places(planes, bits))[..., :length]


def _side_by_side(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
