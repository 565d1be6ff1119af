"""Optax transforms that keep pruned weights at exactly zero."""

from jaxprune.optim._access import get_masks, replace_masks
from jaxprune.optim._gradual import GradualState, gradual
from jaxprune.optim._masked import MaskedState, masked_update

__all__ = ["GradualState", "MaskedState", "get_masks", "gradual", "replace_masks"]
