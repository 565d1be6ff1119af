"""For `flax.linen`: gated modules."""

from jaxprune.linen._gates import BlockGate, ChannelGate, GatedConv, GatedDense, HeadGate, TokenGate

__all__ = ["BlockGate", "ChannelGate", "GatedConv", "GatedDense", "HeadGate", "TokenGate"]
