"""Optax transforms that keep pruned weights at exactly zero, and shared ones equal."""

from jaxprune.optim._access import check, get_masks, replace_masks
from jaxprune.optim._clustered import ClusteredState, clustered
from jaxprune.optim._flax import register
from jaxprune.optim._gradual import GradualState, gradual
from jaxprune.optim._masked import MaskedState, masked_update
from jaxprune.optim._phased import PhasedState, phased
from jaxprune.optim._trainable import trainable

__all__ = [
    "ClusteredState",
    "GradualState",
    "MaskedState",
    "PhasedState",
    "check",
    "clustered",
    "get_masks",
    "gradual",
    "phased",
    "replace_masks",
    "trainable",
]

register()
