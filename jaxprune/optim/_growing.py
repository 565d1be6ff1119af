"""A penalty that grows on the weights that are to go, until they are gone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, ScoreFn, Where
from jaxprune.masks import AnyPattern
from jaxprune.optim._fit import is_empty, takes_update
from jaxprune.optim._masked import when
from jaxprune.optim._moving import Rule, Seen, moving
from jaxprune.optim._selection import (
    Fractions,
    Selection,
    check_weights_only,
    fractions_of,
    scorer,
)


def growing(
    inner: optax.GradientTransformation,
    sparsity: Fractions,
    *,
    growth: float = 1e-4,
    every: int = 10,
    ceiling: float = 1.0,
    pick: float = 0.0,
    settle: int = 0,
    scores: ScoreFn = _trees.magnitudes,
    scope: str = "global",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Press weights towards zero by an L2 penalty that grows, then prune them (GReg).

    Which weights go is decided first: `penalty * w` is then added to their gradient, and the penalty
    grows by `growth` each `every` steps up to `ceiling`. Then they are zero for good, and the network has
    long learnt to do without. With `pick=0` it is decided by the scores at the start (GReg-1); else all
    weights are pressed until the penalty reaches `pick`, which tells them apart by their curvature, and
    it is decided then (GReg-2). With `pattern=jp.structure.Units(graph, reduce="l2")` whole units go, by
    their group norm over all leaves that have them (DepGraph), and `jp.compact` removes them.

    Args:
      inner: any optax transform.
      sparsity: fraction to remove: a number, a tree of them, or a function of the parameters that gives
        one.
      growth: what the penalty grows by, above 0.
      every: steps from one growth to the next, at least 1.
      ceiling: the largest penalty, above 0.
      pick: penalty at which it is decided what goes, at least 0 and below `ceiling`.
      settle: steps at the largest penalty before weights become zero, at least 0.
      scores: `params -> scores`; magnitude by default.
      scope: `"global"` or `"leaf"`, see `jp.masks.from_scores`.
      pattern: see `jp.masks.from_scores`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are pruned; by default the weights.
      min_keep: weights that each leaf keeps at least, with `scope="leaf"`.

    Returns:
      A transform whose state is a `SparseState`; what stays is `state.memory["chosen"]`.

    Raises:
      ValueError: a number out of range, an unknown scope, scores that need gradients, a `where` or
        pattern that does not fit the parameters (from `init`), or `params` missing (from `update`).
      TypeError: compressed leaves among those to prune (from `init`).

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> tx = jp.optim.growing(optax.sgd(0.5), 0.5, growth=0.5, every=1)
      >>> state, grads = tx.init(params), jax.tree.map(jnp.zeros_like, params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].tolist()  # 1.0 and 0.5 go: times 1 - 0.5 * 0.5
      [[0.75, -2.0], [3.0, 0.375]]
      >>> updates, state = tx.update(grads, state, params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [[0.0, -2.0], [3.0, 0.0]]

    Reference: Wang et al., "Neural Pruning via Growing Regularization", 2021,
    https://arxiv.org/abs/2012.09243; Fang et al., "DepGraph: Towards Any Structural Pruning", 2023,
    https://arxiv.org/abs/2301.12900
    """
    _checks.positive("growth", growth)
    _checks.positive("ceiling", ceiling)
    _checks.positive_int("every", every)
    _checks.positive_int("settle", settle, least=0)
    check_weights_only("growing", scores)
    select = Selection(scope, pattern, uses, where, min_keep)
    score = scorer(scores, select)
    steps_to = lambda penalty: every * int(np.ceil(np.float64(penalty) / growth - 1e-9))
    decided, pruned = steps_to(pick), steps_to(ceiling) + settle
    if pick < 0 or decided >= pruned:
        raise ValueError(
            f"pick: expected a penalty of at least 0 and a growth below ceiling={ceiling:g}, got {pick}"
        )

    def chosen(params: Params) -> Masks:
        like = select.all_kept(params, score)
        new = select.masks(score(params, params), fractions_of(sparsity, params))
        return jax.tree.map(lambda m, full: jnp.broadcast_to(m, full.shape), new, like)

    def memory(params: Params) -> dict[str, Any]:
        if is_empty(params):
            return {"chosen": params}
        found = chosen(params)  # also where it is decided later: errors come from init
        return {"chosen": found if not pick else jax.tree.map(lambda m: m & (not m.ndim), found)}

    def reach(seen: Seen) -> tuple[Params, dict[str, Any]]:
        keeps = seen.memory["chosen"]
        if pick:
            keeps = when(seen.step == decided, lambda _: chosen(seen.params), lambda k: k, keeps)
        penalty = jnp.minimum(growth * (seen.step // every), ceiling)
        press = lambda _, g, p, k: _pressed(g, p, k, penalty)
        return _trees.map_with_path(press, seen.grads, seen.params, keeps), {"chosen": keeps}

    rule = Rule(
        "growing",
        lambda params: select.all_kept(params, score),
        lambda seen: (seen.memory["chosen"], seen.memory),
        lambda step, _: step == pruned,
        memory,
        reach=reach,
    )
    return moving(inner, rule)


def _pressed(grad: Any, param: Any, keep: Array, penalty: Array) -> Any:
    if not keep.ndim or not takes_update(param):
        return grad
    return grad + jnp.where(keep, 0, penalty * param).astype(grad.dtype)
