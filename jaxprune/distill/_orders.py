"""Losses on how logits relate to each other: correlations, orders, sureness of the teacher.

Logits are (…, classes).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune.distill._reduce import only, reduced
from jaxprune.distill._softmax import kl_divergence, log_softmax, pearson, ready, scalar, softened


def dist(
    s: Float[Array, "batch classes"],
    t: Float[Array, "batch classes"],
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-8,
    where: Any = None,
) -> Float[Array, ""]:
    """DIST: one minus Pearson's correlation, of classes within examples and of examples within classes.

    `T² (beta (1 - mean_i r(s_i, t_i)) + gamma (1 - mean_c r(s_c, t_c)))` of softmax probabilities.
    Classes of -inf in both (no class of this example) are left out, as if they were not there.

    Args:
      s, t: logits.
      temperature: T, above 0.
      beta, gamma: weights of the relation between classes and between examples.
      eps: least norm.
      where: (batch,), mask of examples that count.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, a temperature not above 0.

    Example:
      >>> t = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 5.0]])
      >>> abs(round(float(jp.distill.dist(t, t)), 5))
      0.0

    Reference: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022,
    https://arxiv.org/abs/2205.10536
    """
    scalar(temperature)
    s, t, _, where = ready(s, t, temperature, -1, where)
    p, q = (jax.nn.softmax(x / temperature, -1) for x in (s, t))
    counts = (s > -jnp.inf) | (t > -jnp.inf)
    counts = counts if where is None else counts & where[:, None]
    mean = lambda axis: reduced(pearson(p, q, axis, eps, counts), "mean", jnp.any(counts, axis))
    return temperature**2 * (beta * (1 - mean(-1)) + gamma * (1 - mean(0)))


def skd_instance(
    s: Float[Array, "batch classes"],
    t: Float[Array, "batch classes"],
    *,
    temperature: float = 4.0,
    unsure: bool = False,
) -> Float[Array, ""]:
    """Streamlined distillation, examples: `mean KL(softmax(t / T), softmax(s / T))`.

    Args:
      s, t: logits.
      temperature: T, above 0.
      unsure: as the authors' program has it: times T², and examples of which the teacher is surer than of
        the median one add nothing to the mean.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, a temperature not above 0.

    Example:
      >>> s, t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> round(float(jp.distill.skd_instance(s, t, temperature=1.0)), 4)
      0.4621

    Reference: Jeong et al., "Streamlined Knowledge Distillation", 2026
    """
    scalar(temperature)
    s, t, *_ = ready(s, t, temperature, -1)
    values = kl_divergence(log_softmax(t, temperature, -1), log_softmax(s, temperature, -1), -1)
    if not unsure:
        return jnp.mean(values)
    sure = jax.lax.stop_gradient(jnp.max(jax.nn.softmax(t, -1), -1))
    return temperature**2 * jnp.mean(jnp.where(sure <= jnp.quantile(sure, 0.5), values, 0.0))


def ranking(
    s: Float[Array, "... classes"],
    t: Float[Array, "... classes"],
    *,
    method: str = "list",
    margin: float = 0.0,
    temperature: Any = 1.0,
    where: Any = None,
    reduction: str = "mean",
) -> Float[Array, "..."]:
    """The student learns the teacher's order of classes.

    - `"list"` (ListMLE): `-log` of the Plackett-Luce probability of the teacher's order under `s / T`.
    - `"pair"`: the mean of `max(0, margin - (s_i - s_j))` over all pairs that the teacher orders i
    before j.

    Args:
      s, t: logits; the classes are the last axis.
      method: `"list"` or `"pair"`.
      margin: of pairs, at least 0.
      temperature: T, above 0, one for all or one per example.
      where: mask of examples that count.
      reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
      A scalar, or (…) per example.

    Raises:
      ValueError: class counts that differ, an unknown method, numbers out of range.

    Example:
      >>> s = jnp.array([[3.0, 2.0, 1.0]])
      >>> float(jp.distill.ranking(s, s, method="pair")), bool(jp.distill.ranking(-s, s) > 2)
      (0.0, True)

    References: Xia et al., "Listwise approach to learning to rank", 2008 (ListMLE); Cao et al., 2007
    """
    _checks.choice("method", method, ("list", "pair"))
    s, t, temperature, where = ready(s, t, temperature, -1, where)
    s = softened(s, temperature, -1)
    if method == "list":
        order = jnp.argsort(-t, -1)
        real = jnp.take_along_axis(t, order, -1) > -jnp.inf  # -inf: no class of this example
        ranked = jnp.where(real, jnp.take_along_axis(s, order, -1), -jnp.inf)
        tails = jax.lax.cumlogsumexp(ranked, axis=ranked.ndim - 1, reverse=True)
        tails, ranked = only(real, tails, ranked)
        return reduced(jnp.sum(tails - ranked, -1), reduction, where)
    if margin < 0:
        raise ValueError(f"margin: expected at least 0, got {margin}")
    before = t[..., :, None] > t[..., None, :]
    cost = jax.nn.relu(margin - (s[..., :, None] - s[..., None, :]))
    count = jnp.maximum(jnp.sum(before, (-1, -2)), 1)
    return reduced(jnp.sum(jnp.where(before, cost, 0.0), (-1, -2)) / count, reduction, where)
