"""Contrastive distillation with memories that the caller carries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune import _checks
from jaxprune.distill._logits import kd
from jaxprune.distill._reduce import frozen, normalized, same_shapes, wide
from jaxprune.distill._softmax import cross_entropy


class CRDState(NamedTuple):
    """The memories of `crd`.

    Attributes:
      student, teacher: (examples, features), the last embedding of each example of the training set.
      student_constant, teacher_constant: normalisers, set by the first batch; 0 before.
    """

    student: Float[Array, "examples features"]
    teacher: Float[Array, "examples features"]
    student_constant: Float[Array, ""]
    teacher_constant: Float[Array, ""]


def crd_init(key: jax.Array, examples: int, features: int) -> CRDState:
    """Random memories for a training set.

    Args:
      key: a PRNG key.
      examples: of the training set.
      features: of embeddings.

    Returns:
      The state that `crd` takes and gives back.

    Example:
      >>> jp.distill.crd_init(jax.random.key(0), 100, 16).student.shape
      (100, 16)
    """
    _checks.positive_int("examples", examples)
    _checks.positive_int("features", features)
    bound = (3 / features) ** 0.5
    one, two = jax.random.split(key)
    draw = lambda k: jax.random.uniform(k, (examples, features), minval=-bound, maxval=bound)
    zero = jnp.zeros(())
    return CRDState(draw(one), draw(two), zero, zero)


def crd(
    s: Float[Array, "batch features"],
    t: Float[Array, "batch features"],
    state: CRDState,
    index: Int[Array, "batch"],
    negatives: Int[Array, "batch draws"],
    *,
    temperature: float = 0.07,
    momentum: float = 0.5,
    eps: float = 1e-7,
) -> tuple[Float[Array, ""], CRDState]:
    """Contrastive representation distillation, by noise contrast against memories.

    Args:
      s, t: embeddings of unit length, of one shape.
      state: the memories.
      index: which examples of the training set they are.
      negatives: other examples to contrast each with, such as
        `jax.random.randint(key, (batch, 4096), 0, examples)`.
      temperature: T, above 0.
      momentum: of the memories, in [0, 1].
      eps: within divisions.

    Returns:
      A scalar (the sum of both directions, as the authors' code has it), and the new state.

    Raises:
      ValueError: shapes that differ, numbers out of range.

    Example:
      >>> state = jp.distill.crd_init(jax.random.key(0), 100, 4)
      >>> x = jnp.eye(4)[:2]
      >>> loss, state = jp.distill.crd(x, x, state, jnp.array([0, 1]), jnp.array([[5, 6], [7, 8]]))
      >>> bool(loss > 0), bool(state.student_constant > 0)
      (True, True)

    Reference: Tian et al., "Contrastive Representation Distillation", 2020,
    https://arxiv.org/abs/1910.10699
    """
    same_shapes(s, t)
    _checks.positive("temperature", temperature)
    _checks.fraction("momentum", momentum)
    s, t = wide(s, t)
    seen = jnp.concatenate([index[:, None], negatives], 1)
    scores = lambda memory, x: jnp.exp(
        jnp.einsum("bkf,bf->bk", frozen(memory[seen]), x) / temperature
    )
    of_student, of_teacher = scores(state.teacher, s), scores(state.student, t)
    examples = state.student.shape[0]

    def constant(known: Array, found: Array) -> Array:
        return frozen(jnp.where(known > 0, known, jnp.mean(found) * examples))

    z_student = constant(state.student_constant, of_student)
    z_teacher = constant(state.teacher_constant, of_teacher)
    noise = negatives.shape[1] / examples

    def contrast(x: Array) -> Array:
        hit = jnp.log(x[:, 0] / (x[:, 0] + noise + eps))
        miss = jnp.log(noise / (x[:, 1:] + noise + eps))
        return -(jnp.sum(hit) + jnp.sum(miss)) / len(x)

    loss = contrast(of_student / z_student) + contrast(of_teacher / z_teacher)

    def kept(memory: Array, x: Array) -> Array:
        moved = memory[index] * momentum + frozen(x) * (1 - momentum)
        return memory.at[index].set(normalized(moved, 1))

    new = CRDState(kept(state.student, s), kept(state.teacher, t), z_student, z_teacher)
    return loss, new


def self_supervision(x: Float[Array, "batch features"]) -> Float[Array, ""]:
    """The contrastive task of SSKD's first stage: augmented examples find their original.

    Args:
      x: embeddings of originals and augmentations: the entries 0, 4, 8, … are originals, each followed by
        three augmentations of it.

    Returns:
      A scalar: cross-entropy of cosine similarities.

    Raises:
      ValueError: a batch that is no multiple of 4.

    Example:
      >>> x = jnp.repeat(jnp.eye(2), 4, axis=0)
      >>> round(float(jp.distill.self_supervision(x)), 4)
      0.3133

    Reference: Xu et al., "Knowledge Distillation Meets Self-Supervision", 2020,
    https://arxiv.org/abs/2006.07114
    """
    alike = _similarities(*wide(x))
    return jnp.mean(cross_entropy(alike, _originals(alike), -1))


def _originals(alike: Array) -> Array:
    return jnp.arange(alike.shape[0]) // 3


def _similarities(x: Array) -> Array:
    """Cosines of augmentations (rows) and originals."""
    if x.shape[0] % 4:
        raise ValueError(
            f"batch: expected originals each followed by three augmentations, got {x.shape[0]} examples, "
            "which is no multiple of 4"
        )
    groups = normalized(x, 1, least=1e-8).reshape(-1, 4, x.shape[1])
    return groups[:, 1:].reshape(-1, x.shape[1]) @ groups[:, 0].T


def sskd(
    s: tuple[Array, Array],
    t: tuple[Array, Array],
    labels: Int[Array, "originals"],
    *,
    kl_temperature: float = 4.0,
    ss_temperature: float = 0.5,
    tf_temperature: float = 4.0,
    ss_ratio: float = 0.75,
    tf_ratio: float = 1.0,
    weights: tuple[float, float, float, float] = (1.0, 0.9, 10.0, 2.7),
) -> Float[Array, ""]:
    """SSKD's second stage: labels, the teacher's logits, its similarities, and its logits of
    augmentations.

    Of similarities and augmentations that the teacher gets wrong, only the given fractions with the least
    errors count.

    Args:
      s, t: `(logits, embeddings)` of originals and augmentations, ordered as in `self_supervision`.
      labels: integers, of the originals.
      kl_temperature, ss_temperature, tf_temperature: of originals, similarities and augmentations,
        above 0.
      ss_ratio, tf_ratio: fractions of the teacher's errors that count, in [0, 1].
      weights: of the four parts.

    Returns:
      A scalar.

    Raises:
      ValueError: a batch that is no multiple of 4, numbers out of range, class counts that differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (8, 5))
      >>> loss = jp.distill.sskd((x, x), (x, x), jnp.array([1, 2]), weights=(0.0, 1.0, 1.0, 1.0))
      >>> abs(round(float(loss), 5))
      0.0

    Reference: Xu et al., "Knowledge Distillation Meets Self-Supervision", 2020,
    https://arxiv.org/abs/2006.07114
    """
    for name, value in (("ss_ratio", ss_ratio), ("tf_ratio", tf_ratio)):
        _checks.fraction(name, value)
    (s_logits, s_embed), (t_logits, t_embed) = wide(*s), wide(*t)
    same_shapes(s_logits, t_logits)
    s_alike, t_alike = _similarities(s_embed), frozen(_similarities(t_embed))
    t_logits = frozen(t_logits)
    parts = lambda x: (x[::4], x.reshape(-1, 4, x.shape[-1])[:, 1:].reshape(-1, x.shape[-1]))
    (s_own, s_moved), (t_own, t_moved) = parts(s_logits), parts(t_logits)
    terms = (
        jnp.mean(cross_entropy(s_own, labels, -1)),
        kd(s_own, t_own, temperature=kl_temperature),
        kd(
            s_alike,
            t_alike,
            temperature=ss_temperature,
            where=_least_wrong(t_alike, _originals(t_alike), ss_ratio),
        ),
        kd(
            s_moved,
            t_moved,
            temperature=tf_temperature,
            where=_least_wrong(t_moved, jnp.repeat(labels, 3), tf_ratio),
        ),
    )
    return jnp.asarray(sum(w * term for w, term in zip(weights, terms, strict=True)))


def _least_wrong(scores: Array, labels: Array, ratio: float) -> Array:
    """Which rows rank their label first, and the given fraction of the others, best ranks first."""
    own = jnp.take_along_axis(scores, labels[:, None], 1)
    before = jnp.arange(scores.shape[1])[None] < labels[:, None]
    rank = jnp.sum((scores > own) | ((scores == own) & before), 1)
    wrong = jnp.sum(rank > 0)
    keep = len(rank) - wrong + jnp.floor(wrong * ratio).astype(jnp.int32)
    order = jnp.argsort(rank, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(rank)))
    return place < keep
