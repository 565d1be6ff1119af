"""Running a function on compressed leaves, without making them dense first."""

from jaxprune.runtime import (  # register their leaves
    _codebooks,
    _factors,
    _input_scaled,
    _integers,
    _pruned,
)
from jaxprune.runtime._choose import Choice
from jaxprune.runtime._compressed import CompressedFunction, Explanation, compressed, lowered_for
from jaxprune.runtime._decoders import dense_decoder
from jaxprune.runtime._lowerings import LOWERINGS
from jaxprune.runtime._rules import Kind, LeafRule, register_leaf
from jaxprune.runtime._tune import tune
from jaxprune.runtime._tuning import tuning_file

__all__ = ["Choice", "CompressedFunction", "Explanation", "Kind", "LeafRule", "register_leaf"]
