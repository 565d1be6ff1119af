"""For `flax.nnx`: modules in, modules out; gated modules."""

from jaxprune.nnx._compact import compact, small_arguments
from jaxprune.nnx._gates import (
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
    "compact",
    "small_arguments",
]
