"""For `flax.linen`: gated modules."""

from jaxprune.linen._gates import (
    BlockGate,
    ChannelGate,
    EarlyExit,
    GatedConv,
    GatedDense,
    HeadGate,
    TokenGate,
)

__all__ = [
    "BlockGate",
    "ChannelGate",
    "EarlyExit",
    "GatedConv",
    "GatedDense",
    "HeadGate",
    "TokenGate",
]
