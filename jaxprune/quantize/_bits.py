"""Several small integers per byte, on every backend.

Fields of 4 or 2 bits lie along the last axis, neighbours in one byte, the first in the lowest bits. An
array so packed slices, maps and shards along all other axes, and along the last in whole bytes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt8


def pack(values: Int8[Array, "*lead n"], width: int) -> UInt8[Array, "*lead bytes"]:
    """Packs integers of `width` (1, 2 or 4) bits; the last byte is padded. Inverse of `unpack`.

    Values may be signed (two's complement) or not; only their lowest `width` bits are stored.
    """
    per_byte = 8 // width
    n = values.shape[-1]
    pad = [(0, 0)] * (values.ndim - 1) + [(0, -n % per_byte)]
    fields = jnp.pad(values.astype(jnp.uint8), pad) & ((1 << width) - 1)
    packed = jnp.zeros((*values.shape[:-1], -(-n // per_byte)), jnp.uint8)
    for i in range(per_byte):
        packed |= fields[..., i::per_byte] << (i * width)
    return packed


def unpack(
    packed: UInt8[Array, "*lead bytes"], width: int, length: int, *, signed: bool
) -> Int8[Array, "*lead n"]:
    """The first `length` integers along the last axis, sign-extended if `signed`. Inverse of `pack`."""
    per_byte = 8 // width
    shifts = jnp.arange(per_byte, dtype=jnp.uint8) * width
    if signed:
        # the field's sign bit moves to the byte's, and an arithmetic shift brings it back
        lifted = packed[..., None] << (8 - width - shifts)
        fields = jax.lax.bitcast_convert_type(lifted, jnp.int8) >> (8 - width)
    else:
        fields = ((packed[..., None] >> shifts) & ((1 << width) - 1)).astype(jnp.int8)
    flat = fields.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)  # (..., bytes, fields)
    return flat[..., :length]


def fields(
    packed: UInt8[Array, "*lead bytes"], width: int, *, signed: bool
) -> list[Int8[Array, "*lead bytes"]]:
    """The integers of each place in the bytes: `unpack` before they are put side by side.

    `jnp.stack(fields(x, w), -1)`, flattened along the last two axes and cut, is `unpack(x, w, n)`.
    """
    places = range(8 // width)
    if not signed:
        return [((packed >> i * width) & ((1 << width) - 1)).astype(jnp.int8) for i in places]
    lifted = [packed << (8 - width - i * width) for i in places]
    return [jax.lax.bitcast_convert_type(x, jnp.int8) >> (8 - width) for x in lifted]
