"""Sharing: weights share values, layers share tensors, matrices share factors."""

from jaxprune.share._cluster_tree import cluster_tree, materialize_tree
from jaxprune.share._clustered import ClusteredArray

__all__ = ["ClusteredArray"]
