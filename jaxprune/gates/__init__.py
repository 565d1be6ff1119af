"""Gates: which channels, tokens and blocks run is decided for each input, and what is closed is skipped.

The method in five steps: train the network; design gates (`attach`, or the modules of `jp.linen` and
`jp.nnx`); train both together, with a cost (`l1_penalty`, `expected_l0`, `target_rate`,
`weighted_cost`) or a policy (`reinforce`); run with pruning (`gathered_conv`, `skip_block`,
`route_top_k`, `early_exit`); fine-tune with the gates held.
"""

from jaxprune.gates._attach import GatedFunction, attach
from jaxprune.gates._binary import (
    gumbel_sigmoid,
    saliency,
    semantic_hashing,
    straight_through,
    top_k,
)
from jaxprune.gates._concrete import expected_l0, hard_concrete, hard_concrete_mean
from jaxprune.gates._costs import (
    entropy,
    example_costs,
    l1_penalty,
    load_balance,
    target_rate,
    weighted_cost,
)
from jaxprune.gates._exits import (
    all_exits,
    check_heads,
    confidence,
    early_exit,
    exit_loss,
    exit_when_confident,
    left_early,
)
from jaxprune.gates._inspect import Inspection, inspect, over_batches
from jaxprune.gates._joint import joint_loss
from jaxprune.gates._layers import (
    METHODS,
    RANDOM,
    beside,
    bottleneck,
    gate_logits,
    gate_params,
    kept,
    opened,
    pooled,
)
from jaxprune.gates._reinforce import (
    Baseline,
    bernoulli,
    curriculum,
    dropped_reward,
    log_prob,
    moving_baseline,
    policy_entropy,
    ppo_clip_loss,
    reinforce,
)
from jaxprune.gates._route import route_top_k, skip_block
from jaxprune.gates._skip import (
    QUARTERS,
    active,
    bucketed_conv,
    bucketed_dense,
    gathered_conv,
    gathered_dense,
    in_buckets,
    open_channels,
    scattered,
    spread,
)

__all__ = [
    "Baseline",
    "GatedFunction",
    "Inspection",
    "active",
    "attach",
    "bernoulli",
    "bottleneck",
    "bucketed_conv",
    "bucketed_dense",
    "confidence",
    "curriculum",
    "dropped_reward",
    "early_exit",
    "entropy",
    "example_costs",
    "exit_loss",
    "exit_when_confident",
    "expected_l0",
    "gate_logits",
    "gate_params",
    "gathered_conv",
    "gathered_dense",
    "gumbel_sigmoid",
    "hard_concrete",
    "hard_concrete_mean",
    "in_buckets",
    "inspect",
    "joint_loss",
    "l1_penalty",
    "load_balance",
    "log_prob",
    "moving_baseline",
    "opened",
    "over_batches",
    "policy_entropy",
    "pooled",
    "ppo_clip_loss",
    "reinforce",
    "route_top_k",
    "saliency",
    "scattered",
    "semantic_hashing",
    "skip_block",
    "straight_through",
    "target_rate",
    "top_k",
    "weighted_cost",
]
