"""Optax transforms that keep pruned weights at exactly zero, and shared ones equal."""

from jaxprune.optim._ac_dc import ac_dc
from jaxprune.optim._access import check, get_masks, replace_masks, sparse_params
from jaxprune.optim._clustered import ClusteredState, clustered
from jaxprune.optim._flax import register
from jaxprune.optim._forward import ForwardState
from jaxprune.optim._gradual import gradual
from jaxprune.optim._group_lasso import proximal_group_lasso, zero_units
from jaxprune.optim._growing import growing
from jaxprune.optim._learned_nm import learned_nm
from jaxprune.optim._lottery import Ticket, lottery
from jaxprune.optim._masked import MaskedState, masked_update
from jaxprune.optim._metrics import metrics
from jaxprune.optim._movement import movement
from jaxprune.optim._moving import Changes, SparseState
from jaxprune.optim._phased import PhasedState, phased
from jaxprune.optim._powerprop import PowerpropState, powerprop
from jaxprune.optim._proximal import ProximalState, proximal_l1
from jaxprune.optim._rigl import rigl
from jaxprune.optim._set import set_
from jaxprune.optim._soft_threshold import soft_threshold
from jaxprune.optim._spartan import spartan
from jaxprune.optim._static_random import static_random
from jaxprune.optim._straight_through import straight_through
from jaxprune.optim._top_kast import top_kast
from jaxprune.optim._trainable import trainable

__all__ = [
    "Changes",
    "ClusteredState",
    "ForwardState",
    "MaskedState",
    "PhasedState",
    "PowerpropState",
    "ProximalState",
    "SparseState",
    "Ticket",
    "ac_dc",
    "check",
    "clustered",
    "get_masks",
    "gradual",
    "growing",
    "metrics",
    "movement",
    "phased",
    "powerprop",
    "proximal_group_lasso",
    "proximal_l1",
    "replace_masks",
    "rigl",
    "set_",
    "soft_threshold",
    "sparse_params",
    "spartan",
    "static_random",
    "straight_through",
    "top_kast",
    "trainable",
    "zero_units",
]

register()
