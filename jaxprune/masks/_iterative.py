"""Pruning in many small steps, each by scores of what the last one left."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _checks, _trees
from jaxprune._progress import track
from jaxprune._types import Masks, Params, PyTree, Scores, Where, is_compressed
from jaxprune.masks._apply import apply_masks
from jaxprune.masks._from_scores import AnyPattern, from_scores


def iterative(
    score_fn: Callable[[Params], Scores],
    params: Params,
    sparsity: float | PyTree,
    *,
    rounds: int = 100,
    scope: str = "global",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
    min_keep: int = 0,
) -> Masks:
    """Prune in rounds: score what is left, and remove the same fraction of it each time.

    After round `k` of `n` a fraction `(1 - s)^(k / n)` is kept. What was removed stays so. All rounds
    share one compilation. So `synflow` avoids cutting layers off, and other scores see the network that
    they prune (FORCE, iterative SNIP).

    Args:
      score_fn: `params -> scores`, of parameters whose removed weights are 0; is jitted.
      params: any tree of arrays.
      sparsity: fraction to remove in the end, in [0, 1]: a number, or a tree of budgets.
      rounds: how many.
      scope, pattern, uses, min_keep: see `jp.masks.from_scores`.
      where: which leaves are pruned; by default all that `score_fn` scores.

    Returns:
      Masks like `params`.

    Raises:
      ValueError: a NaN score, a sparsity outside [0, 1], and what `from_scores` raises.

    Example:
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> flow = lambda p: jp.scores.synflow(fn, p, jnp.ones((1, 4)))
      >>> masks = jp.masks.iterative(flow, params, 0.5, rounds=4)
      >>> jp.sparsity(masks)
      0.5

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", 2020, https://arxiv.org/abs/2006.05467; de Jorge et al., "Progressive
    skeletonization", 2020, https://arxiv.org/abs/2006.09081
    """
    _checks.positive_int("rounds", rounds)
    if where is not None:
        _trees.select(params, where, uses=uses)  # a bad `where` fails before any scoring
    jax.tree.map(lambda s: _checks.fraction("sparsity", s), sparsity)

    @jax.jit
    def score(params: Params, masks: Masks) -> Scores:
        found = score_fn(apply_masks(params, masks))
        if where is not None:
            found = _trees.restrict(found, params, where, uses=uses)
        return jax.tree.map(lambda s, m: jnp.where(m, s, -jnp.inf) if s.ndim else s, found, masks)

    options: dict[str, Any] = {"scope": scope, "pattern": pattern, "min_keep": min_keep}
    masks = jax.tree.map(lambda _: jnp.array(True), params, is_leaf=is_compressed)
    for number in track(range(1, rounds + 1), "rounds"):
        share = number / rounds
        # the last share is 1, and the count exact
        removed = jax.tree.map(lambda s: 1.0 - (1.0 - s) ** share if share < 1 else s, sparsity)  # noqa: B023
        masks = from_scores(score(params, masks), removed, uses=uses, **options)
    return masks
