"""Sharing: weights share values, layers share tensors, matrices share factors."""

from jaxprune._trees import resolve_ties
from jaxprune.share._cluster_tree import cluster_tree, materialize_tree
from jaxprune.share._clustered import (
    SELECTED,
    SELECTED_BYTES,
    ClusteredArray,
    codewords_at,
    index_places,
)
from jaxprune.share._factorize_tree import factorize_tree, ranks_table
from jaxprune.share._low_rank import LowRankArray, TuckerArray
from jaxprune.share._similarity import Similarity, similarities, similarity_table
from jaxprune.share._tie_tree import tie_tree
from jaxprune.share._tied import TiedArray, TiedLayers, ties
from jaxprune.share._vectors import assigned, line_start, line_turn

__all__ = [
    "ClusteredArray",
    "LowRankArray",
    "Similarity",
    "TiedArray",
    "TiedLayers",
    "TuckerArray",
    "ranks_table",
    "resolve_ties",
    "similarities",
    "similarity_table",
    "ties",
]
