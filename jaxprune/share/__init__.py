"""Sharing: weights share values, layers share tensors, matrices share factors."""

from jaxprune.share._bits import widths_of
from jaxprune.share._cluster_tree import cluster_tree, materialize_tree
from jaxprune.share._clustered import (
    SELECTED,
    SELECTED_BYTES,
    ClusteredArray,
    codewords_at,
    index_places,
)

__all__ = ["ClusteredArray"]
