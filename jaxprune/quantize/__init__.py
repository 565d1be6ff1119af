"""Quantization: spec, scale, round, pack; and the same with straight-through gradients."""

from jaxprune.quantize._array import (
    Levels,
    QuantizedArray,
    largest_values,
    level_fields,
    quantize,
    quantize_with,
    refuse_non_finite,
)
from jaxprune.quantize._errors import Error, errors, errors_table
from jaxprune.quantize._fake import fake_quantize, fake_quantize_tree
from jaxprune.quantize._input_scaled import InputScaledArray
from jaxprune.quantize._inputs import (
    ActivationQuantized,
    DynamicInput,
    InputScale,
    round_ste,
    scale_gradient,
    tell_fixed_scales,
)
from jaxprune.quantize._misfits import Misfits
from jaxprune.quantize._scale import from_levels, reciprocal, scale_of, spread, to_levels
from jaxprune.quantize._search import least_squares_scale
from jaxprune.quantize._spec import NF4_LEVELS, Spec, integer_range
from jaxprune.quantize._tree import Rules, dequantize_tree, has_parts, quantize_tree, specs_for
from jaxprune.quantize._views import leading_block

__all__ = [
    "ActivationQuantized",
    "DynamicInput",
    "Error",
    "InputScale",
    "InputScaledArray",
    "QuantizedArray",
    "Spec",
    "errors",
    "errors_table",
]
