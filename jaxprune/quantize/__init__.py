"""Quantization: spec, scale, round, pack; and the same with straight-through gradients."""

from jaxprune.quantize._array import (
    Levels,
    QuantizedArray,
    by_place,
    joined_levels,
    largest_values,
    levels_by_place,
    quantize,
    quantize_with,
    strided,
)
from jaxprune.quantize._errors import Error, errors, errors_table
from jaxprune.quantize._fake import fake_quantize, fake_quantize_tree
from jaxprune.quantize._inputs import (
    ActivationQuantized,
    DynamicInput,
    InputScale,
    on_grid,
    slowed,
)
from jaxprune.quantize._scale import from_levels, reciprocal, scale_of, spread, to_levels
from jaxprune.quantize._spec import NF4_LEVELS, Spec, integer_range, resolved
from jaxprune.quantize._tree import Rules, dequantize_tree, has_parts, quantize_tree, specs_for
from jaxprune.quantize._views import leading_block

__all__ = [
    "ActivationQuantized",
    "DynamicInput",
    "Error",
    "InputScale",
    "QuantizedArray",
    "Spec",
    "errors",
    "errors_table",
]
