"""Quantization: spec, scale, round, pack; and the same with straight-through gradients."""

from jaxprune.quantize._array import QuantizedArray
from jaxprune.quantize._fake import fake_quantize, fake_quantize_tree
from jaxprune.quantize._spec import Spec
from jaxprune.quantize._tree import dequantize_tree, quantize_tree

__all__ = ["QuantizedArray", "Spec"]
