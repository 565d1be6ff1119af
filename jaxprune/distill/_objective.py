"""One loss out of a task and several distillation terms."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import _checks, _trees
from jaxprune._types import Params, is_compressed
from jaxprune.distill._capture import At, capture
from jaxprune.distill._logits import kd
from jaxprune.runtime import compressed


class Seen(NamedTuple):
    """What a network made of a batch.

    Attributes:
      out: its outputs.
      at: captured values, by name.
    """

    out: Any
    at: dict[str, Any]


Term = tuple[Any, Callable[..., jax.Array]]
"""A weight, and `(student: Seen, teacher: Seen, batch) -> scalar`, or with `extra` parameters as a
fourth.
"""


def objective(
    student: Callable[..., Any],
    teacher: Callable[..., Any] | None,
    terms: Mapping[str, Term],
    *,
    task: Callable[[Any, Any], jax.Array] | None = None,
    task_weight: float = 1.0,
    inputs: Callable[[Any], Any] | None = None,
    student_at: At | None = None,
    teacher_at: At | None = None,
    precomputed: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """A loss for teacher–student training: a task loss, and weighted distillation terms.

    Args:
      student, teacher: `fn(params, *inputs)`; the teacher runs without gradients, on compressed leaves as
        `jp.compressed` runs them. No teacher if its outputs are `precomputed`.
      terms: `{name: (weight, f)}` with `f(student, teacher, batch)`, both a `Seen`: `.out` and captured
        values `.at[name]`. A fourth argument gets the `extra` parameters (projectors).
      task: `(student's output, batch) -> scalar`, or none.
      task_weight: its weight.
      inputs: what of a batch is given to both functions, as a tuple or one value; by default the first
        entry of a tuple (images of `(images, labels)`), a lone array itself.
      student_at, teacher_at: values to capture, see `jp.distill.capture`.
      precomputed: `batch -> output` of a teacher that ran before, see `jp.distill.precompute`.

    Returns:
      `loss_fn(student_params, teacher_params, batch, key=None, extra=None) -> (loss, aux)`: `aux` holds
      every term, unweighted, `"task"` and `"loss"`. A key is handed to both functions' `key=`
      argument, folded, where given. Differentiate with `jax.value_and_grad(loss_fn, has_aux=True)`.

    Raises:
      ValueError: no terms and no task, or neither teacher nor `precomputed`.

    Example:
      >>> fn = lambda p, x: x @ p
      >>> soft = lambda s, t, batch: jp.distill.kd(s.out, t.out, temperature=2.0)
      >>> loss_fn = jp.distill.objective(fn, fn, {"kd": (0.9, soft)})
      >>> loss, aux = loss_fn(jnp.eye(2), jnp.eye(2), (jnp.ones((3, 2)), jnp.zeros(3, int)))
      >>> float(loss), sorted(aux)
      (0.0, ['kd', 'loss'])
    """
    if not terms and task is None:
        raise ValueError("terms: expected at least one, or a task")
    if teacher is None and precomputed is None and terms:
        raise ValueError("teacher: expected a function, or precomputed outputs")
    inputs = _first if inputs is None else inputs

    def see(fn: Callable[..., Any], params: Params, batch: Any, at: At | None, key: Any) -> Seen:
        given = inputs(batch)
        args = given if isinstance(given, tuple) else (given,)
        kwargs = {} if key is None else {"key": key}
        if at is not None:
            return Seen(*capture(fn, params, *args, at=at, **kwargs))
        squeezed = any(is_compressed(leaf) for leaf in _trees.flatten(params)[1])
        run = compressed(fn) if squeezed else fn
        return Seen(run(params, *args, **kwargs), {})

    def loss_fn(
        student_params: Params,
        teacher_params: Params,
        batch: Any,
        key: jax.Array | None = None,
        extra: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        own = see(student, student_params, batch, student_at, keys[0])
        if precomputed is not None:
            other = Seen(precomputed(batch), {})
        elif teacher is not None and terms:
            other = see(teacher, teacher_params, batch, teacher_at, keys[1])
        else:
            other = Seen(None, {})
        other = jax.tree.map(jax.lax.stop_gradient, other)
        aux: dict[str, jax.Array] = {}
        total = jnp.zeros(())
        if task is not None:
            aux["task"] = task(own.out, batch)
            total = total + task_weight * aux["task"]
        for name, (weight, term) in terms.items():
            more = () if extra is None else (extra,)
            aux[name] = term(own, other, batch, *more)
            total = total + weight * aux[name]
        return total, {**aux, "loss": total}

    return loss_fn


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def mutual(
    outs: list[jax.Array], *, temperature: float = 1.0, loss: Callable[..., jax.Array] | None = None
) -> list[jax.Array]:
    """Deep mutual learning: each network learns from all others, none of which it moves.

    Args:
      outs: logits of at least two networks on the same batch.
      temperature: of the default loss, above 0.
      loss: `(s, t) -> scalar`; by default `jp.distill.kd`.

    Returns:
      One loss per network, the mean over the others. Sum them to train all at once.

    Raises:
      ValueError: fewer than two networks.

    Example:
      >>> a, b = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> [round(float(x), 4) for x in jp.distill.mutual([a, b])]
      [0.4621, 0.4621]

    Reference: Zhang et al., "Deep Mutual Learning", 2018, https://arxiv.org/abs/1706.00384
    """
    if len(outs) < 2:
        raise ValueError(f"outs: expected at least two networks, got {len(outs)}")
    one = (lambda s, t: kd(s, t, temperature=temperature)) if loss is None else loss
    found = []
    for i, s in enumerate(outs):
        others = [one(s, jax.lax.stop_gradient(t)) for j, t in enumerate(outs) if j != i]
        found.append(jnp.mean(jnp.stack(others)))
    return found


def ema(teacher: Params, student: Params, decay: Any) -> Params:
    """A self-distillation teacher: the moving average of the student, `decay t + (1 - decay) s`.

    Args:
      teacher, student: trees of one structure; leaves that are no floats are the student's.
      decay: in [0, 1]; a schedule's value may be traced.

    Returns:
      The new teacher.

    Raises:
      ValueError: trees that differ, a decay out of range.

    Example:
      >>> float(jp.distill.ema(jnp.array(1.0), jnp.array(0.0), 0.75))
      0.75

    Reference: Tarvainen & Valpola, "Mean teachers", 2017, https://arxiv.org/abs/1703.01780
    """
    _checks.fraction("decay", decay)
    student = _checks.aligned("student", student, "teacher", teacher)
    return jax.tree.map(
        lambda t, s: (decay * t + (1 - decay) * s).astype(t.dtype) if _trees.is_floating(t) else s,
        teacher,
        student,
    )
