"""Reconstruction: weights quantized and pruned so that outputs on a few batches stay what they were."""

from jaxprune.reconstruct._awq import awq
from jaxprune.reconstruct._gptq import gptq
from jaxprune.reconstruct._sparsegpt import sparsegpt

__all__ = ["awq", "gptq", "sparsegpt"]
