"""Optax transforms that keep pruned weights at exactly zero, and shared ones equal."""

from jaxprune.optim._access import check, get_masks, replace_masks
from jaxprune.optim._clustered import ClusteredState, clustered
from jaxprune.optim._flax import register
from jaxprune.optim._gradual import gradual
from jaxprune.optim._masked import MaskedState, masked_update
from jaxprune.optim._moving import Changes, SparseState
from jaxprune.optim._phased import PhasedState, phased
from jaxprune.optim._rigl import rigl
from jaxprune.optim._set import set_
from jaxprune.optim._static_random import static_random
from jaxprune.optim._trainable import trainable

__all__ = [
    "Changes",
    "ClusteredState",
    "MaskedState",
    "PhasedState",
    "SparseState",
    "check",
    "clustered",
    "get_masks",
    "gradual",
    "phased",
    "replace_masks",
    "rigl",
    "set_",
    "static_random",
    "trainable",
]

register()
