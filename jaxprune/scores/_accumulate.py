"""Means over data: of a score, or of anything per example, batch after batch."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _checks
from jaxprune._progress import track
from jaxprune._types import Params, PyTree, Where
from jaxprune.scores._chosen import chosen_of, gradients, wide


def accumulate(
    score_fn: Callable[..., PyTree],
    params: Params,
    batches: Iterable[Any],
    *,
    microbatch: int | None = None,
) -> PyTree:
    """Average `score_fn(params, *batch)` over batches, or over examples.

    Batches count by their examples, the size of their leading axis. `score_fn` is compiled once for each
    shape of a batch.

    Args:
      score_fn: `score_fn(params, *batch)`, a tree of arrays: a score, squared gradients, …
      params: any tree of arrays.
      batches: tuples, each what follows `params`; a lone array counts as a one-tuple.
      microbatch: `None`: one call for each batch. A number: one call for each *example*, as a batch of
        one, so many of them at a time; more take more memory.

    Returns:
      The tree of `score_fn`, in float32.

    Raises:
      ValueError: no batches; arrays of a batch whose leading axes differ.

    Example:
      >>> loss = lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2)
      >>> params, x, y = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros((2, 1))
      >>> taylor = lambda p, x, y: jp.scores.snip(loss, p, x, y)  # averaged over examples:
      >>> jp.scores.accumulate(taylor, params, [(x, y)], microbatch=2)["w"].tolist()
      [[1.0], [4.0]]
    """
    if microbatch is None:
        each = lambda p, batch: jax.tree.map(lambda x: x.astype(jnp.float32), score_fn(p, *batch))
        return mean_over(jax.jit(each), params, batches)
    _checks.positive_int("microbatch", microbatch)
    run = jax.jit(partial(mean_of_examples, score_fn, microbatch=microbatch))
    return mean_over(run, params, batches)


def fisher_diagonal(
    loss_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    microbatch: int = 8,
    uses: Any = None,
    where: Where = None,
) -> PyTree:
    """Estimate the diagonal of the empirical Fisher information: the mean of squared gradients.

    Of per-example gradients, as `jp.scores.fisher` needs them; the square of a batch's mean gradient is
    something else.

    Args:
      loss_fn: `loss_fn(params, *batch)`, a scalar; sees one example at a time, as a batch of one.
      params: any tree of dense arrays.
      batches: tuples, each what follows `params`; a lone array counts as a one-tuple.
      microbatch: examples at a time.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: float32, non-negative, in the weight's shape; 0 for other leaves.

    Raises:
      ValueError: no batches, a loss that is no scalar, a `where` that matches nothing.
      TypeError: compressed leaves.

    Example:
      >>> loss = lambda p, x: jnp.mean(x @ p["w"])
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0], [-1.0, 0.0]])
      >>> information = jp.scores.fisher_diagonal(loss, params, [x])
      >>> information["w"].tolist(), jp.scores.fisher(params, information)["w"].tolist()
      ([[1.0], [2.0]], [[0.5], [1.0]])

    Reference: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
    https://arxiv.org/abs/1801.05787
    """
    chosen_of(params, where, uses)  # a bad `where` fails before any batch is read

    def squares(p: Params, *example: Any) -> PyTree:
        chosen = chosen_of(p, where, uses)
        found = gradients(loss_fn, chosen, example)
        return chosen.tree([jnp.square(wide(g)) for g in found], jnp.zeros(()))

    return accumulate(squares, params, batches, microbatch=microbatch)


def mean_over(
    run: Callable[[Params, tuple[Any, ...]], PyTree], params: Params, batches: Iterable[Any]
) -> PyTree:
    """The mean of `run(params, batch)` over batches, weighted by their examples."""
    total, count = None, 0
    for batch in track(batches, "batches"):
        batch = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        n = examples_in(batch)
        found = run(params, batch)
        total = (
            jax.tree.map(lambda x, n=n: n * x, found) if total is None else _plus(total, found, n)
        )
        count += n
    if total is None:
        raise ValueError("batches: expected at least one, got none; is the iterator exhausted?")
    return jax.tree.map(lambda x: x / count, total)


@jax.jit
def _plus(total: PyTree, found: PyTree, n: Any) -> PyTree:
    return jax.tree.map(lambda a, b: a + n * b, total, found)


def examples_in(batch: Sequence[Any]) -> int:
    """The size of the leading axis that all arrays of a batch share; 1 of scalars.

    Raises:
      ValueError: they differ, or there are none.
    """
    sizes = {jnp.shape(x)[0] if jnp.shape(x) else 1 for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(
            f"batches: expected arrays with the examples along a leading axis of one size, got "
            f"{sorted(sizes)}; give what is no example to the function by a closure"
        )
    return sizes.pop()


def _summed(x: jax.Array) -> jax.Array:
    return x.sum(0)


def mean_of_examples(
    fn: Callable[..., PyTree],
    params: Params,
    batch: tuple[Any, ...],
    *,
    microbatch: int,
    reduce: Callable[[Any], Any] = _summed,
) -> PyTree:
    """The mean of `fn(params, *example)` over the examples of a batch, each a batch of one.

    Args:
      fn: gives a tree of arrays.
      params: any tree.
      batch: arrays with examples along their leading axis.
      microbatch: examples at a time.
      reduce: sums what `fn` gave for several examples, along a new leading axis.
    """
    one = lambda example: fn(params, *jax.tree.map(lambda x: x[None], example))
    many = lambda part: jax.tree.map(lambda x: reduce(wide(x)), jax.vmap(one)(part))
    batch = jax.tree.map(jnp.asarray, batch)
    n = examples_in(batch)
    size = min(microbatch, n)
    whole = n // size * size
    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), batch)
    shapes = jax.eval_shape(many, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, many(part)), None)
    total = jax.lax.scan(add, zeros, parts)[0]
    if whole < n:
        total = add(total, jax.tree.map(lambda x: x[whole:], batch))[0]
    return jax.tree.map(lambda x: x / n, total)
