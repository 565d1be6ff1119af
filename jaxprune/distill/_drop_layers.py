"""Fewer and fewer layers, each time taught by the whole network what it did."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Params
from jaxprune.distill._recover import as_inputs, outputs_differ, recover, relative_hint
from jaxprune.graph import trace
from jaxprune.structure import compact, layer_masks, layer_scores


def drop_layers(
    fn: Callable[..., Any],
    params: Params,
    batches: Callable[[], Iterable[Any]],
    tx: Any,
    *,
    count: int,
    stages: int = 2,
    by: str = "influence",
    loss: Callable[[Any], jax.Array] | None = None,
    pattern: str | None = None,
    match: Mapping[str, str] | None = None,
    weight: float = 1.0,
    terms: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], Params]:
    """Progressive layer dropping: in each stage the layers that matter least go, and the rest recovers.

    Scores are measured anew in each stage, on its first batch. All stages learn from the whole network.

    Args:
      fn: `fn(params, *batch)`, a residual network.
      params: its parameters.
      batches: gives the batches of a stage, tuples or lone arrays, anew each time it is called.
      tx: an optax transform, begun anew in each stage.
      count: layers to remove in all.
      stages: in how many steps, at most `count`.
      by, loss, pattern: of `jp.structure.layer_scores` and `layer_masks`.
      match: `{name: path of a parameter}`: what is computed with it shall be as in the whole network
        (see `capture`), as long as its layer is there.
      weight: of each match.
      terms: more terms of `objective`; by default the difference of outputs.

    Returns:
      `(compact_fn, small_params)`, as `jp.compact` gives them.

    Raises:
      ValueError: more stages than layers to remove, no batches, a match that is no parameter.

    Example:
      >>> import optax
      >>> def fn(p, x):
      ...     for i in range(3):
      ...         x = x + jnp.tanh(x @ p[f"up{i}"]) @ p[f"down{i}"]
      ...     return x @ p["out"]
      >>> params = {f"{side}{i}": 0.1 * jax.random.normal(jax.random.key(i), (4, 4))
      ...           for side in ("up", "down") for i in range(3)} | {"out": jnp.eye(4)}
      >>> data = lambda: [jnp.ones((8, 4))] * 3
      >>> small, left = jp.distill.drop_layers(fn, params, data, optax.sgd(0.1), count=2)
      >>> sum(leaf.size > 0 for leaf in jax.tree.leaves(left)), small(left, jnp.ones((8, 4))).shape
      (3, (8, 4))

    References: Sanh et al., DistilBERT, 2019, https://arxiv.org/abs/1910.01108; Men et al., ShortGPT,
    2024, https://arxiv.org/abs/2403.03853
    """
    _checks.positive_int("count", count)
    _checks.positive_int("stages", stages)
    if stages > count:
        raise ValueError(f"stages: {stages} for {count} layers; expected at most one for each")
    known = _trees.leaf_paths(params)
    match = dict(match or {})
    for path in match.values():
        if path not in known:
            raise ValueError(_trees.no_match(path, known, parameter="match"))
    student, own = fn, params
    for left in np.diff(np.round(np.linspace(0, count, stages + 1))).astype(int).tolist():
        first = next(iter(batches()), None)
        if first is None:
            raise ValueError("batches: expected at least one in each stage, got none")
        first = as_inputs(first)
        graph = trace(student, own, *first)
        scores = layer_scores(graph, own, *first, by=by, loss=loss, pattern=pattern)
        masks = layer_masks(graph, layer_scores=scores, count=left, pattern=pattern)
        student, own = compact(student, own, masks, *first)
        there = {p for p, x in zip(*_trees.flatten(own)[:2], strict=True) if jnp.size(x)}
        at = {name: path for name, path in match.items() if path in there}
        every = dict(terms) if terms is not None else {"outputs": (1.0, outputs_differ)}
        every |= {name: (weight, _matching(name)) for name in at}
        own = recover(
            student, own, fn, params, batches(), tx, terms=every, student_at=at or None,
            teacher_at=at or None,
        )  # fmt: skip
    return student, own


def _matching(name: str) -> Callable[..., jax.Array]:
    """The difference of a captured value."""
    return lambda s, t, batch: relative_hint(s.at[name], t.at[name])
