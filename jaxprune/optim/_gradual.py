"""Masks that grow with training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, ScheduleFn, ScoreFn, Where
from jaxprune.masks import AnyPattern
from jaxprune.optim._moving import Rule, Seen, moving
from jaxprune.optim._selection import Selection, check_rising, scorer, wanted


def gradual(
    inner: optax.GradientTransformation,
    schedule: ScheduleFn,
    *,
    scores: ScoreFn = _trees.magnitudes,
    scope: str = "global",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
    every: int = 1,
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Prune while training: at each change of the schedule the lowest-scoring weights become zero.

    Weights that are zero stay zero, and the inner optimizer holds nothing of them; as with
    `jp.masked_update`, nothing may follow this transform in a chain (`jp.optim.check`). Between two
    changes the masks are only read: scoring and selection run under `lax.cond`, in the same compiled
    step.

    Args:
      inner: any optax transform.
      schedule: `step -> sparsity` in [0, 1], such as `jp.schedules.cubic`. The first update is step
        0; values are clipped to [0, 1]. It may return a tree of them, one per leaf
        (`jp.schedules.scaled`).
      scores: `params -> scores` or `(params, grads) -> scores`; magnitude by default.
      scope: `"global"` or `"leaf"`, see `jp.masks.from_scores`.
      pattern: `None`, `Block`, `Channel` or `NM`; or `jp.structure.Units` for structured pruning, after
        which `jp.compact(fn, params, jp.optim.get_masks(state), *args)` makes the model smaller.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are pruned; by default the weights: as `uses` says, else by shapes and names.
      every: look at the schedule only at every so many steps, at least 1.
      min_keep: weights that each leaf keeps at least, with `scope="leaf"`.

    Returns:
      A transform whose state is a `SparseState`.

    Raises:
      ValueError: a schedule that goes down, `every` below 1, an unknown scope, `min_keep` without
        `scope="leaf"`, a `where` or pattern that does not fit the parameters (from `init`), or `params`
        missing (from `update`).
      TypeError: compressed leaves among those to prune (from `init`).

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> tx = jp.optim.gradual(optax.sgd(0.0), jp.schedules.linear(0.5, end=2))
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].tolist()
      [[0.0, -2.0], [3.0, 0.0]]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878
    """
    _checks.positive_int("every", every)
    if not callable(schedule):
        raise TypeError(
            f"schedule: expected a callable step -> sparsity, got {type(schedule).__name__}; "
            "for a constant sparsity use jp.schedules.one_shot"
        )
    check_rising(schedule)
    select = Selection(scope, pattern, uses, where, min_keep)
    score = scorer(scores, select)

    def due(step: Array, memory: dict[str, Any]) -> Array:
        held = jax.tree.leaves(memory["sparsity"])
        target = jax.tree.leaves(wanted(schedule, step))
        change = [a != b for a, b in zip(held, target, strict=True)]
        return (step % every == 0) & jnp.any(jnp.stack(change))

    def move(seen: Seen) -> tuple[Masks, dict[str, Any]]:
        found = jax.tree.map(
            lambda s, m: s if jnp.ndim(s) == 0 else jnp.where(m, s, -jnp.inf),
            score(seen.params, seen.grads),
            seen.masks,
        )
        target = wanted(schedule, seen.step)
        return select.masks(found, target), {"sparsity": target}

    def memory(_: Params) -> dict[str, Any]:
        start = wanted(schedule, jnp.zeros((), jnp.int32))
        return {"sparsity": jax.tree.map(jnp.zeros_like, start)}

    start = lambda params: select.all_kept(params, score)
    return moving(inner, Rule("gradual", start, move, due, memory))
