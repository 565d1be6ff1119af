"""Quantization: spec, scale, round, pack; and the same with straight-through gradients."""

from jaxprune.quantize._array import (
    Levels,
    QuantizedArray,
    by_place,
    joined_levels,
    largest_values,
    levels_by_place,
    strided,
)
from jaxprune.quantize._fake import fake_quantize, fake_quantize_tree
from jaxprune.quantize._inputs import ActivationQuantized, DynamicInput, InputScale
from jaxprune.quantize._spec import Spec
from jaxprune.quantize._tree import dequantize_tree, quantize_tree
from jaxprune.quantize._views import leading_block

__all__ = ["ActivationQuantized", "DynamicInput", "InputScale", "QuantizedArray", "Spec"]
