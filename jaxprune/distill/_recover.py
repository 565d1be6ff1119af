"""Recovery of a compressed network from its own original."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._progress import track
from jaxprune._types import Params
from jaxprune.distill._capture import At
from jaxprune.distill._features import hint
from jaxprune.distill._objective import Seen, objective
from jaxprune.optim import trainable


def outputs_differ(s: Seen, t: Seen, batch: Any) -> jax.Array:
    """The squared difference of outputs, relative to the teacher's."""
    pairs = zip(jax.tree.leaves(s.out), jax.tree.leaves(t.out), strict=True)
    return jnp.mean(jnp.stack([relative_hint(a, b) for a, b in pairs]))


def relative_hint(s: jax.Array, t: jax.Array) -> jax.Array:
    """The squared difference, relative to the teacher's mean square."""
    return hint(s, t) / jnp.maximum(jnp.mean(jnp.square(t)), 1e-12)


def as_inputs(batch: Any) -> tuple[Any, ...]:
    """All of a batch, as arguments of a function."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def recover(
    student: Callable[..., Any],
    student_params: Params,
    teacher: Callable[..., Any],
    teacher_params: Params,
    batches: Iterable[Any],
    tx: Any,
    *,
    terms: dict[str, Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    student_at: At | None = None,
    teacher_at: At | None = None,
    on_step: Callable[[int, dict[str, jax.Array]], None] | None = None,
) -> Params:
    """Trains a compressed network to do again what its original does, on unlabelled data.

    For the small function of `jp.compact`, for masked parameters (`tx = jp.masked_update(adam,
    masks)`), for trees of `jp.quantize_tree` (scales, biases and norms train; `jp.qat.prepare` trains
    weights), `jp.cluster_tree` (codebooks train) and `jp.factorize_tree` (factors train).

    Args:
      student, student_params: the compressed network.
      teacher, teacher_params: its original.
      batches: what both are given: tuples, or lone arrays.
      tx: an optax transform.
      terms: of `jp.distill.objective`; by default the squared difference of outputs over their mean
        square.
      inputs: what of a batch is given to both; by default all of it.
      student_at, teacher_at: values to capture, for terms that need them.
      on_step: called with the step and its losses.

    Returns:
      The student's parameters, trained.

    Raises:
      ValueError: no batches.

    Example:
      >>> import optax
      >>> fn = lambda p, x: x @ p["w"]
      >>> dense = {"w": jnp.array([[1.0, 0.1], [0.1, 1.0]])}
      >>> pruned, masks = jp.prune_tree(dense, 0.5)
      >>> x = jax.random.normal(jax.random.key(0), (64, 2)) @ jnp.array([[1.0, 1.0], [0.0, 0.2]])
      >>> tx = jp.masked_update(optax.sgd(0.5), masks)
      >>> tuned = jp.distill.recover(fn, pruned, fn, dense, [x] * 30, tx)
      >>> bool(jnp.mean((fn(tuned, x) - fn(dense, x))**2) < jnp.mean((fn(pruned, x) - fn(dense, x))**2))
      True
    """
    terms = {"outputs": (1.0, outputs_differ)} if terms is None else terms
    loss_fn = objective(
        student,
        teacher,
        terms,
        inputs=as_inputs if inputs is None else inputs,
        student_at=student_at,
        teacher_at=teacher_at,
    )
    tx = tx if _only_floats(student_params) else trainable(tx)

    @jax.jit
    def step(params: Params, original: Params, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        grads, aux = jax.grad(loss_fn, has_aux=True, allow_int=True)(params, original, batch)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(_moved, params, updates), state, aux

    params, state, count = student_params, tx.init(student_params), 0
    for batch in track(batches, "recover"):
        params, state, aux = step(params, teacher_params, state, batch)
        if on_step is not None:
            on_step(count, aux)
        count += 1
    if not count:
        raise ValueError("batches: expected at least one, got none (an exhausted iterator?)")
    return params


def _moved(p: Any, u: Any) -> Any:
    return (p + u).astype(p.dtype) if jnp.issubdtype(jnp.result_type(p), jnp.floating) else p


def _only_floats(tree: Params) -> bool:
    return all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in jax.tree.leaves(tree))
