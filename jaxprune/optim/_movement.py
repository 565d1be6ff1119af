"""Pruning by where weights move to, not by where they are."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, ScheduleFn, Where
from jaxprune.masks import AnyPattern
from jaxprune.optim._fit import is_empty, takes_update
from jaxprune.optim._forward import ForwardRule, forward
from jaxprune.optim._moving import Seen
from jaxprune.optim._selection import Selection, as_schedule, wanted


def movement(
    inner: optax.GradientTransformation,
    schedule: ScheduleFn | float,
    *,
    method: str = "hard",
    rate: float = 1.0,
    penalty: float = 0.0,
    every: int = 1,
    scope: str = "global",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Keep the weights that move away from zero: scores gather `-w * dL/dw` over the training.

    Scores learn by the straight-through gradient of the mask, `s <- s - rate * w * dL/dw`, for masked
    weights too, which wait with the value that they had. The loss is that of
    `jp.optim.sparse_params(opt_state, params)`. Scores begin at 0: begin with a dense phase.

    Args:
      inner: any optax transform, for the weights.
      schedule: `step -> sparsity`; with `method="soft"` `step -> threshold` of `sigmoid(s)`, in [0, 1].
      method: `"hard"`, the largest scores, or `"soft"`, those above the threshold.
      rate: learning rate of the scores, above 0.
      penalty: with `method="soft"`, strength of the penalty `sum sigmoid(s)`, which makes it sparse.
      every: masks are made anew at multiples of this many steps.
      scope: `"global"` or `"leaf"`, see `jp.masks.from_scores`.
      pattern: see `jp.masks.from_scores`; with `method="hard"`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are masked; by default the weights.

    Returns:
      A transform whose state is a `ForwardState`; the scores are `state.memory["scores"]`.

    Raises:
      ValueError: numbers out of range, an unknown method or scope, a pattern or scope with
        `method="soft"`, a penalty without it, a `where` or pattern that does not fit the parameters
        (from `init`), or `params` missing (from `update`).
      TypeError: a schedule of another type.

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> tx = jp.optim.movement(optax.sgd(0.1), jp.schedules.one_shot(0.5, at=1))
      >>> grads = {"w": jnp.array([[-1.0, 1.0], [1.0, -1.0]])}  # only 3.0 shrinks
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> jp.optim.get_masks(state)["w"].tolist()
      [[True, True], [False, False]]

    Reference: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
    https://arxiv.org/abs/2005.07683
    """
    _checks.choice("method", method, ("hard", "soft"))
    _checks.positive("rate", rate)
    _checks.positive_int("every", every)
    soft = method == "soft"
    if soft and (pattern is not None or scope != "global"):
        raise ValueError('pattern, scope: a threshold knows none; use method="hard"')
    if penalty < 0 or (penalty and not soft):
        raise ValueError(
            f'penalty: expected at least 0, and 0 without method="soft"; got {penalty}'
        )
    schedule = as_schedule(schedule)
    select = Selection(scope, pattern, uses, where)

    def memory(params: Params) -> dict[str, Any]:
        if is_empty(params):
            return {"scores": params}
        blank = select.restricted(_trees.magnitudes(params), params)
        zeros = lambda s: jnp.zeros_like(s, jnp.float32) if s.ndim else s
        return {"scores": jax.tree.map(zeros, blank)}

    def masks_of(scores: Params, step: Array) -> Masks:
        target = wanted(schedule, step)
        if soft:
            return jax.tree.map(lambda s: jax.nn.sigmoid(s) > target if s.ndim else s > 0, scores)
        return select.masks(scores, target)

    def start(params: Params) -> Masks:
        return select.all_kept(params, lambda p, _: memory(p)["scores"])

    def reach(seen: Seen) -> tuple[Params, dict[str, Any]]:
        def learnt(_: str, s: Any, p: Any, g: Any) -> Any:
            if not jnp.ndim(s):
                return s
            slope = p.astype(jnp.float32) * g.astype(jnp.float32)
            gate = jax.nn.sigmoid(s)
            return s - rate * (slope + penalty * gate * (1 - gate))

        def masked(_: str, g: Any, m: Any) -> Any:
            return jnp.where(m, g, jnp.zeros((), g.dtype)) if takes_update(g) else g

        scores = _trees.map_with_path(learnt, seen.memory["scores"], seen.params, seen.grads)
        return _trees.map_with_path(masked, seen.grads, seen.masks), {"scores": scores}

    def move(seen: Seen) -> tuple[Masks, dict[str, Any]]:
        return masks_of(seen.memory["scores"], seen.step), seen.memory

    rule = ForwardRule(
        "movement",
        start,
        move,
        lambda step, _: step % every == 0,
        memory,
        reach=reach,
        free=lambda masks, _: masks,
    )
    return forward(inner, rule)
