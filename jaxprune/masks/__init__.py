"""Scores and sparsity in, masks out: exact selection, patterns, application, packing."""

from jaxprune.masks._apply import (
    PackedMask,
    PackedTree,
    apply_masks,
    masked,
    pack_masks,
    resolve,
    sparsity,
    unpack_masks,
)
from jaxprune.masks._from_scores import AnyPattern, from_scores
from jaxprune.masks._iterative import iterative
from jaxprune.masks._patterns import NM, Block, Channel, Pattern, TreePattern, pattern_on
from jaxprune.masks._prune import prune_tree

__all__ = ["NM", "Block", "Channel", "PackedMask", "Pattern", "from_scores", "iterative"]
