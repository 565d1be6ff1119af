"""Pruned leaves with quantized values, as quantized arrays."""

from jaxprune.quantize import QuantizedArray, Spec
from jaxprune.sparse import SparseArray


def as_quantized(w: SparseArray) -> QuantizedArray | None:
    """A pruned leaf of integer codes as an array of codes, zeros between; `None` where that cannot be."""
    values = w.values
    if not isinstance(values, QuantizedArray) or values.zero_point is not None:
        return None
    if not values.spec.format.startswith("int") or values.ndim != w.ndim:
        return None
    shared, stored = values.scale.shape[w.axis], values.shape[w.axis]
    # groups of scales must be whole groups of neighbours
    if shared > 1 and (w.length % w.m or stored % shared or (stored // shared) % w.n):
        return None
    codes = w.spread(values.levels())
    return QuantizedArray.of_levels(codes, values.scale, None, Spec(bits=8), w.dtype)
