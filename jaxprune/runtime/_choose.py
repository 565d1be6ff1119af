"""Which lowering a product takes.

Measured on CPU (`benchmarks/compressed.py`): an integer product of 8-bit codes runs several times faster
than a float one, from two rows on. Two planes of activations make it precise and still faster. Compilers
for GPU and TPU fuse the conversion of codes into a float product.
"""

from typing import NamedTuple

import jax
import numpy as np

from jaxprune._types import CompressedArray
from jaxprune.quantize import QuantizedArray
from jaxprune.runtime import _lowerings
from jaxprune.runtime._lowerings import Codes, codes_of

_INTEGER = ("int8", "int4", "int2")
_LONGEST = (2**31 - 1) // (127 * 128)  # products of 8-bit integers that 32 bits hold


class Choice(NamedTuple):
    """How one operation runs on a compressed leaf.

    Attributes:
      path: path of the leaf.
      primitive: the operation.
      shapes: shapes of its operands.
      lowering: `"two_planes"`, `"integer"`, `"converted"`, `"rows"` (a look-up of compressed rows), or
        `"dense"`: the leaf is made dense first.
      why: the reason.
      source: where the program called it.
      dense_bytes: bytes of the dense leaf, where it is made.
    """

    path: str
    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    lowering: str
    why: str
    source: str
    dense_bytes: int


def lowering_for(
    array: QuantizedArray, activations: str | None, *, across: bool, rows: int
) -> tuple[str, str, Codes | None]:
    """A lowering's name, the reason, and the matrix as it reads it.

    Args:
      array: a quantized matrix.
      activations: `"int8"` to quantize the other operand row by row.
      across: the contracted axis is the last.
      rows: rows of the other operand.
    """
    codes = codes_of(array, across=across)
    if isinstance(codes, str):
        return "dense", codes, None
    kind = array.spec.format
    contracted = array.shape[-1 if across else -2]
    if kind in _INTEGER and contracted > _LONGEST:
        return "converted", f"an integer sum over {contracted} products may overflow", codes
    if kind in _INTEGER:
        if activations == "int8":
            return "integer", "8-bit activations, one scale per row", codes
        if jax.default_backend() == "cpu":
            return "two_planes", f"integer products are fastest on CPU, at {rows} rows too", codes
    if kind not in _INTEGER and jax.default_backend() == "cpu":
        return "dense", f"{kind} converts as fast as it multiplies on CPU", None
    return "converted", "the compiler fuses the conversion into the product", codes


def run(name: str, x: jax.Array, codes: Codes) -> jax.Array:
    """A product by its lowering: (rows, k) -> (rows, n)."""
    return getattr(_lowerings, name)(x, codes)


def dense_bytes(array: CompressedArray) -> int:
    """Bytes of the dense array."""
    return int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize
