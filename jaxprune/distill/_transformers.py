"""Losses on the inside of transformers.

Hidden states are (batch, time, features), attention distributions and vectors (batch, heads, time, …).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune.distill._features import hint
from jaxprune.distill._reduce import (
    counted,
    normalized,
    only,
    reduced,
    same_batch,
    same_shapes,
    wide,
)
from jaxprune.distill._softmax import kl_divergence


def attention_relation(
    s: Float[Array, "batch time features"],
    t: Float[Array, "batch time features"],
    *,
    heads: int,
    where: Any = None,
) -> Float[Array, ""]:
    """MiniLM v2: the divergence of self-attention relations of queries, keys or values.

    Vectors are split into `heads` relation heads, whatever the models' own; a relation is
    `softmax(x xᵀ / sqrt(d))` over time. One call each for queries, keys and values.

    Args:
      s, t: queries (keys, values) of one layer, heads side by side; features may differ.
      heads: relation heads; divides the features of both.
      where: (batch, time), True = a token, False = padding.

    Returns:
      A scalar: the mean over batch, heads and tokens.

    Raises:
      ValueError: batch or time that differ, heads that do not divide the features.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 8))
      >>> abs(round(float(jp.distill.attention_relation(x, x, heads=2)), 6))
      0.0

    Reference: Wang et al., MiniLMv2, 2020, https://arxiv.org/abs/2012.15828
    """
    _checks.positive_int("heads", heads)
    same_batch(s, t)
    if s.shape[1] != t.shape[1]:
        same_shapes(s, t)
    where = counted(where, s.shape[:2])
    tokens = None if where is None else where[:, :, None]
    p, q = (_relation(x, x, heads, where) for x in only(tokens, *wide(t, s)))
    keep = None if where is None else where[:, None, :]
    return reduced(kl_divergence(p, q, -1), "mean", keep)


def _relation(x: Array, y: Array, heads: int, where: Any) -> Array:
    """Log-probabilities (batch, heads, time, time)."""
    if x.shape[-1] % heads:
        raise ValueError(
            f"heads: {heads} do not divide {x.shape[-1]} features; choose a divisor of both models'"
        )
    split = lambda z: z.reshape(*z.shape[:2], heads, -1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", split(x), split(y)) / (x.shape[-1] // heads) ** 0.5
    if where is not None:
        scores = jnp.where(where[:, None, None, :], scores, -1e9)
    return jax.nn.log_softmax(scores, -1)


def attention_distribution(
    s: Float[Array, "batch heads time time"],
    t: Float[Array, "batch heads time time"],
    *,
    where: Any = None,
    method: str = "kl",
) -> Float[Array, ""]:
    """MiniLM v1 and TinyBERT: attention maps.

    Args:
      s, t: attention probabilities (`"kl"`), or scores before the softmax (`"mse"`), of as many heads.
      where: (batch, time), True = a token.
      method: `"kl"` (MiniLM) or `"mse"` (TinyBERT).

    Returns:
      A scalar: the mean over batch, heads and tokens.

    Raises:
      ValueError: shapes that differ, an unknown method.

    Example:
      >>> p = jnp.full((1, 2, 3, 3), 1 / 3)
      >>> float(jp.distill.attention_distribution(p, p))
      0.0

    References: Wang et al., MiniLM, 2020, https://arxiv.org/abs/2002.10957; Jiao et al., TinyBERT, 2019,
    https://arxiv.org/abs/1909.10351
    """
    _checks.choice("method", method, ("kl", "mse"))
    same_shapes(s, t)
    where = counted(where, (s.shape[0], s.shape[2]))
    both = None if where is None else where[:, None, :, None] & where[:, None, None, :]
    s, t = only(both, *wide(s, t))
    if method == "mse":
        return reduced(jnp.square(s - t), "mean", both)
    log = lambda x: jnp.log(jnp.maximum(x, 1e-30))
    values = jnp.sum(jnp.where(t > 0, t * (log(t) - log(s)), 0.0), -1)
    return reduced(values, "mean", None if where is None else where[:, None, :])


def value_relation(
    s: Float[Array, "batch time features"],
    t: Float[Array, "batch time features"],
    *,
    heads: int,
    where: Any = None,
) -> Float[Array, ""]:
    """MiniLM v1's relation of values: `attention_relation` of the values of the last layer.

    Args:
      s, t: values, heads side by side.
      heads: attention heads.
      where: (batch, time), True = a token.

    Returns:
      A scalar.

    Raises:
      ValueError: as `attention_relation`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 8))
      >>> abs(round(float(jp.distill.value_relation(x, x, heads=2)), 6))
      0.0

    Reference: Wang et al., MiniLM, 2020, https://arxiv.org/abs/2002.10957
    """
    return attention_relation(s, t, heads=heads, where=where)


def patient_kd(
    s: Sequence[Float[Array, "batch features"]], t: Sequence[Float[Array, "batch features"]]
) -> Float[Array, ""]:
    """Patient distillation: the squared distance of hidden states of unit length, over layers.

    Args:
      s: the student's states, one per layer, of one place (such as [CLS]) or pooled.
      t: the teacher's, of as many layers; pick them by `jp.distill.layer_map`.

    Returns:
      A scalar: the mean over batch and layers.

    Raises:
      ValueError: numbers of layers or shapes that differ.

    Example:
      >>> x = [jnp.ones((2, 3))]
      >>> float(jp.distill.patient_kd(x, [2 * x[0]]))
      0.0

    Reference: Sun et al., "Patient Knowledge Distillation for BERT", 2019,
    https://arxiv.org/abs/1908.09355
    """
    _same_layers(s, t)
    losses = []
    for a, b in zip(s, t, strict=True):
        same_shapes(a, b)
        a, b = (normalized(x, -1) for x in wide(a, b))
        losses.append(jnp.mean(jnp.sum(jnp.square(a - b), -1)))
    return jnp.mean(jnp.stack(losses))


def hidden_states(
    s: Sequence[Float[Array, "batch time features"]],
    t: Sequence[Float[Array, "batch time features"]],
    *,
    where: Any = None,
) -> Float[Array, ""]:
    """TinyBERT: the squared difference of hidden states (and embeddings), over layers.

    Args:
      s: the student's states, projected if narrower.
      t: the teacher's, of as many layers; pick them by `jp.distill.layer_map`.
      where: (batch, time), True = a token.

    Returns:
      A scalar: the mean over all entries of tokens and over layers.

    Raises:
      ValueError: numbers of layers or shapes that differ.

    Example:
      >>> float(jp.distill.hidden_states([jnp.ones((1, 2, 3))], [jnp.zeros((1, 2, 3))]))
      1.0

    Reference: Jiao et al., TinyBERT, 2019, https://arxiv.org/abs/1909.10351
    """
    _same_layers(s, t)
    keep = None if where is None else jnp.asarray(where)[..., None]
    return jnp.mean(jnp.stack([hint(a, b, where=keep) for a, b in zip(s, t, strict=True)]))


def _same_layers(s: Sequence[Any], t: Sequence[Any]) -> None:
    if len(s) != len(t) or not s:
        raise ValueError(
            f"teacher: {len(t)} layers, the student has {len(s)}; pick as many with jp.distill.layer_map"
        )


def layer_map(student: int, teacher: int, *, method: str = "uniform") -> tuple[int, ...]:
    """Which teacher layer each student layer learns from.

    Args:
      student, teacher: numbers of layers, the student's not more.
      method: `"uniform"`: every k-th, the last to the last; `"last"`: the last ones; `"first"`: the first
        ones.

    Returns:
      One index per student layer.

    Raises:
      ValueError: more student than teacher layers, an unknown method.

    Example:
      >>> jp.distill.layer_map(3, 12), jp.distill.layer_map(2, 6, method="last")
      ((3, 7, 11), (4, 5))

    Reference: Jiao et al., TinyBERT, 2019, https://arxiv.org/abs/1909.10351 (uniform); Sun et al., 2019
    (last, skip)
    """
    _checks.choice("method", method, ("uniform", "last", "first"))
    _checks.positive_int("student", student)
    if student > teacher:
        raise ValueError(f"student: {student} layers are more than the teacher's {teacher}")
    if method == "first":
        return tuple(range(student))
    if method == "last":
        return tuple(range(teacher - student, teacher))
    return tuple((i + 1) * teacher // student - 1 for i in range(student))
