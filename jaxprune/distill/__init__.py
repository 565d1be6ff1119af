"""Distillation: losses, values from within networks, and the wiring between teacher and student.

Losses take the student first and stop nothing: give the teacher's side through
`jax.lax.stop_gradient`, or use `objective`, which does.
"""

from jaxprune.distill._capture import Site, capture, sites
from jaxprune.distill._contrastive import CRDState, crd, crd_init, self_supervision, sskd
from jaxprune.distill._drop_layers import drop_layers
from jaxprune.distill._features import (
    activation_boundary,
    batch_normalized,
    cosine,
    factor_transfer,
    hint,
    kta,
    mgd,
    pad,
    srd,
    vid,
    whitened_mse,
)
from jaxprune.distill._logits import divergence, dkd, kd, kd_with_labels, logit_std_kd
from jaxprune.distill._maps import (
    attention_transfer,
    dist_plus,
    fsp,
    hierarchical_context,
    nst,
    resized,
)
from jaxprune.distill._objective import Seen, ema, mutual, objective
from jaxprune.distill._orders import dist, ranking, skd_instance
from jaxprune.distill._precompute import load_outputs, precompute
from jaxprune.distill._projectors import (
    Projector,
    conv_projector,
    dense_projector,
    mgd_generator,
    review_fusion,
    vid_regressor,
)
from jaxprune.distill._recover import recover
from jaxprune.distill._relations import (
    affinity,
    cckd,
    cka,
    ickd,
    info_nce,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
    skd_direction,
)
from jaxprune.distill._tokens import regularized_kd, sampled_kd, sequence_kd, top_k_kd
from jaxprune.distill._transformers import (
    attention_distribution,
    attention_relation,
    hidden_states,
    layer_map,
    patient_kd,
    value_relation,
)

__all__ = [
    "CRDState",
    "Projector",
    "Seen",
    "Site",
    "activation_boundary",
    "affinity",
    "attention_distribution",
    "attention_relation",
    "attention_transfer",
    "batch_normalized",
    "capture",
    "cckd",
    "cka",
    "conv_projector",
    "cosine",
    "crd",
    "crd_init",
    "dense_projector",
    "dist",
    "dist_plus",
    "divergence",
    "dkd",
    "drop_layers",
    "ema",
    "factor_transfer",
    "fsp",
    "hidden_states",
    "hierarchical_context",
    "hint",
    "ickd",
    "info_nce",
    "kd",
    "kd_with_labels",
    "kta",
    "layer_map",
    "load_outputs",
    "logit_std_kd",
    "mgd",
    "mgd_generator",
    "mutual",
    "nst",
    "objective",
    "pad",
    "patient_kd",
    "pkt",
    "precompute",
    "ranking",
    "recover",
    "regularized_kd",
    "resized",
    "review_fusion",
    "rkd_angle",
    "rkd_distance",
    "sampled_kd",
    "self_supervision",
    "sequence_kd",
    "similarity_preserving",
    "sites",
    "skd_direction",
    "skd_instance",
    "srd",
    "sskd",
    "top_k_kd",
    "value_relation",
    "vid",
    "vid_regressor",
    "whitened_mse",
]
