"""Quantization-aware training: leaves that train on the grid that they will be quantized to."""

from jaxprune.qat._array import QATArray
from jaxprune.qat._observe import observe
from jaxprune.qat._tree import convert, prepare

__all__ = ["QATArray", "convert", "observe", "prepare"]
