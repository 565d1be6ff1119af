"""Sparse forward passes, dense weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, ScheduleFn, ScoreFn, Scores, Where
from jaxprune.masks import NM, AnyPattern
from jaxprune.optim._fit import takes_update
from jaxprune.optim._forward import ForwardRule, forward
from jaxprune.optim._moving import Seen
from jaxprune.optim._selection import (
    Selection,
    as_schedule,
    check_weights_only,
    scorer,
    wanted,
)
from jaxprune.scores import random


def straight_through(
    inner: optax.GradientTransformation,
    schedule: ScheduleFn | float,
    *,
    scores: ScoreFn = _trees.magnitudes,
    key: jax.Array | None = None,
    decay: float = 0.0,
    every: int = 1,
    scope: str = "leaf",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
    min_keep: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Mask in the forward pass, and let the gradient reach all weights (straight-through estimator).

    The parameters stay dense. The loss is that of `jp.optim.sparse_params(opt_state, params)`; so is the
    network in the end. With N:M and `decay=2e-4` this is SR-STE: weights that the mask leaves out
    shrink.

    Args:
      inner: any optax transform.
      schedule: `step -> sparsity` (or a tree of them), or a number, such as 0.5 with `NM(2, 4)`;
        at 0 all weights stay.
      scores: `params -> scores`; magnitude by default.
      key: instead of `scores`: masks at random, drawn anew each time.
      decay: times each weight that is masked is added to its gradient.
      every: masks are made anew of the weights at multiples of this many steps.
      scope: `"leaf"` or `"global"`, see `jp.masks.from_scores`.
      pattern: see `jp.masks.from_scores`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are masked; by default the weights.
      min_keep: weights that each leaf keeps at least; 0 with `scope="global"`.

    Returns:
      A transform whose state is a `ForwardState`.

    Raises:
      ValueError: a number out of range, an unknown scope, scores that need gradients, a `where` or
        pattern that does not fit the parameters (from `init`), or `params` missing (from `update`).
      TypeError: a schedule of another type.

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> tx = jp.optim.straight_through(optax.sgd(0.1), 0.5)
      >>> state = tx.init(params)
      >>> loss = lambda p: jnp.sum(p["w"])
      >>> grads = jax.grad(loss)(jp.optim.sparse_params(state, params))
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> jp.optim.sparse_params(state, params)["w"].tolist()
      [[0.0, -2.0999999046325684], [2.9000000953674316, 0.0]]

    Reference: Zhou et al., "Learning N:M Fine-Grained Structured Sparse Neural Networks From Scratch",
    2021, https://arxiv.org/abs/2102.04010
    """
    schedule = as_schedule(schedule)
    _checks.positive_int("every", every)
    if decay < 0:
        raise ValueError(f"decay: expected a number of at least 0, got {decay}")
    check_weights_only("straight_through", scores)
    select = Selection(scope, pattern, uses, where, min_keep if scope == "leaf" else 0)
    score = scorer(scores, select)

    def masks_at(params: Params, step: Array) -> Masks:
        found: Scores = score(params, params)
        if key is not None:
            found = select.restricted(random(params, jax.random.fold_in(key, step)), params)
        target = wanted(schedule, step)
        new = select.masks(found, target)
        if isinstance(pattern, NM):  # dense while nothing is asked for
            new = (
                jax.tree.map(lambda m: m | jnp.all(jnp.asarray(target) == 0), new)
                if isinstance(target, jax.Array)
                else new
            )
        return new

    def start(params: Params) -> Masks:
        shape = select.all_kept(params, score)
        new = masks_at(params, jnp.zeros((), jnp.int32))
        return jax.tree.map(lambda m, like: jnp.broadcast_to(m, like.shape), new, shape)

    def move(seen: Seen) -> tuple[Masks, dict[str, Any]]:
        return masks_at(seen.params, seen.step), seen.memory

    def reach(seen: Seen) -> tuple[Params, dict[str, Any]]:
        pulled = lambda _, g, p, m: (
            g + jnp.where(m, 0, decay * p).astype(g.dtype) if takes_update(p) else g
        )
        return _trees.map_with_path(pulled, seen.grads, seen.params, seen.masks), seen.memory

    rule = ForwardRule(
        "straight_through",
        start,
        move,
        lambda step, _: step % every == 0,
        reach=reach if decay else None,
    )
    return forward(inner, rule)
