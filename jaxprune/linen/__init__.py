"""For `flax.linen`: gated modules, and layers of fixed connectivity."""

from jaxprune.linen._gates import (
    BlockGate,
    ChannelGate,
    EarlyExit,
    GatedConv,
    GatedDense,
    HeadGate,
    TokenGate,
)
from jaxprune.linen._sparse import (
    SparseConv,
    SparseDense,
    SparseEmbed,
)

__all__ = [
    "BlockGate",
    "ChannelGate",
    "EarlyExit",
    "GatedConv",
    "GatedDense",
    "HeadGate",
    "SparseConv",
    "SparseDense",
    "SparseEmbed",
    "TokenGate",
]
