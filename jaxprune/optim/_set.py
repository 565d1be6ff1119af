"""Connections that move at random."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array

from jaxprune._types import Scores, Where
from jaxprune.masks import AnyPattern
from jaxprune.optim._moving import Seen
from jaxprune.optim._regrow import Fresh, check_moves, regrowing
from jaxprune.optim._selection import Fractions, Selection
from jaxprune.scores import random


def set_(
    inner: optax.GradientTransformation,
    sparsity: Fractions,
    *,
    key: jax.Array,
    drop: float | Callable[[Any], Array] = 0.3,
    every: int = 100,
    begin: int = 0,
    end: int | None = None,
    fresh: Fresh | None = None,
    scope: str = "leaf",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
    min_keep: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Sparse evolutionary training: drop the weights of least magnitude, grow others at random.

    Masks are random at first, and the count of connections stays what it is. A step that moves masks
    applies no gradient. What was just dropped may grow again, and is then as it was; other new
    connections begin at zero, without momentum.

    Args:
      inner: any optax transform.
      sparsity: fraction to remove: a number, a tree of them, or a function of the parameters that gives
        one, such as `lambda p: jp.budgets.erk(p, 0.9)`.
      key: of all random choices.
      drop: fraction of the connections dropped at a time, or a function of the step, such as
        `jp.schedules.cosine(0.0, initial=0.3, end=10_000)`.
      every: masks move at multiples of this, at least 1.
      begin: not before this step.
      end: not after this step; by default always. Three quarters of the training are customary.
      fresh: initializer `(key, shape, dtype) -> array` of new connections, such as
        `jax.nn.initializers.normal(0.01)`; zero without.
      scope: `"leaf"` (the count of each leaf stays) or `"global"` (that of all together).
      pattern: see `jp.masks.from_scores`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are pruned; by default the weights.
      min_keep: weights that each leaf keeps at least; 0 with `scope="global"`.

    Returns:
      A transform whose state is a `SparseState`.

    Raises:
      ValueError: steps or fractions out of range, an unknown scope, a `where` or pattern that does not
        fit the parameters (from `init`), or `params` missing (from `update`).
      TypeError: compressed leaves among those to prune (from `init`).

    Example:
      >>> params = {"w": jnp.arange(16.0).reshape(4, 4)}
      >>> tx = jp.optim.set_(optax.sgd(0.1), 0.5, key=jax.random.key(0), every=2)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> jp.sparsity(jp.optim.get_masks(state)), int(state.changes.moves)
      (0.5, 2)

    Reference: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
    Connectivity", 2018, https://arxiv.org/abs/1707.04780
    """
    check_moves(drop, every, begin, end)
    min_keep = min_keep if scope == "leaf" else 0
    return regrowing(
        "set_",
        inner,
        sparsity,
        key,
        grow=_at_random,
        drop=drop,
        every=every,
        begin=begin,
        end=end,
        select=Selection(scope, pattern, uses, where, min_keep),
        fresh=fresh,
    )


def _at_random(seen: Seen, key: jax.Array) -> Scores:
    return random(seen.params, key)
