"""Indices of 1 to 8 bits, truly packed.

A width is split into powers of two (5 = 4 + 1), each a *plane* of bytes of its own that holds its bits of
several neighbours along the last axis, the first in the lowest bits. Rows start at whole bytes, so that
packed indices slice, map and shard along all other axes.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

Planes = tuple[Array, ...]


def widths_of(bits: int) -> tuple[int, ...]:
    """The widths of the planes, largest first: 7 gives (4, 2, 1)."""
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def packed(indices: UInt8[Array, "*lead n"], bits: int) -> Planes:
    """Planes of indices below `2 ** bits`. Inverse of `unpacked`."""
    planes, shift = [], 0
    n = indices.shape[-1]
    for width in widths_of(bits):
        per = 8 // width
        fields = (indices >> shift) & ((1 << width) - 1)
        fields = jnp.pad(fields, [(0, 0)] * (indices.ndim - 1) + [(0, -n % per)])
        plane = fields[..., ::per]
        for i in range(1, per):
            plane = plane | (fields[..., i::per] << (i * width))
        planes.append(plane)
        shift += width
    return tuple(planes)


def unpacked(planes: Planes, bits: int, length: int) -> UInt8[Array, "*lead n"]:
    """The first `length` indices along the last axis. Inverse of `packed`."""
    found, shift = None, 0
    for plane, width in zip(planes, widths_of(bits), strict=True):
        per = 8 // width
        shifts = jnp.arange(per, dtype=jnp.uint8) * width
        fields = (plane[..., None] >> shifts) & ((1 << width) - 1)  # (..., bytes, places)
        fields = fields.reshape(*plane.shape[:-1], -1)[..., :length] << shift
        found = fields if found is None else found | fields
        shift += width
    assert found is not None
    return found


def places(plane: UInt8[Array, "*lead bytes"], width: int) -> list[UInt8[Array, "*lead bytes"]]:
    """The indices of each place in the bytes of a single plane: cheaper than in order."""
    return [(plane >> (i * width)) & ((1 << width) - 1) for i in range(8 // width)]
