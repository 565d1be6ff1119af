"""Distillation: losses, values from within networks, and the wiring between teacher and student.

Losses take the student first and stop nothing: give the teacher's side through
`jax.lax.stop_gradient`, or use `objective`, which does.
"""

from jaxprune.distill._capture import Site, capture, sites
from jaxprune.distill._contrastive import CRDState, crd, crd_init, self_supervision, sskd
from jaxprune.distill._features import (
    activation_boundary,
    attention_transfer,
    batch_normalized,
    cosine,
    factor_transfer,
    fsp,
    hierarchical_context,
    hint,
    kta,
    mgd,
    nst,
    pad,
    resized,
    srd,
    vid,
    whitened_mse,
)
from jaxprune.distill._logits import (
    dist,
    divergence,
    dkd,
    kd,
    kd_with_labels,
    logit_std_kd,
    ranking,
    regularized_kd,
    sampled_kd,
    sequence_kd,
    top_k_kd,
)
from jaxprune.distill._projectors import (
    Projector,
    conv_projector,
    dense_projector,
    mgd_generator,
    review_fusion,
    vid_regressor,
)
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
)
from jaxprune.distill._transformers import (
    attention_distribution,
    attention_relation,
    hidden_states,
    layer_map,
    patient_kd,
    value_relation,
)
