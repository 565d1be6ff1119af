"""For `flax.nnx`: modules in, modules out; gated modules, and layers of fixed connectivity."""

from jaxprune.nnx._compact import compact, small_arguments
from jaxprune.nnx._exits import EarlyExit
from jaxprune.nnx._gates import (
    BlockGate,
    ChannelGate,
    GatedConv,
    GatedDense,
    HeadGate,
    TokenGate,
)
from jaxprune.nnx._sparse import (
    ConnectivityIndex,
    SparseConv,
    SparseDense,
    SparseEmbed,
)

__all__ = [
    "BlockGate",
    "ChannelGate",
    "ConnectivityIndex",
    "EarlyExit",
    "GatedConv",
    "GatedDense",
    "HeadGate",
    "SparseConv",
    "SparseDense",
    "SparseEmbed",
    "TokenGate",
    "compact",
    "small_arguments",
]
