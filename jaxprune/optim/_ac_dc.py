"""Phases of sparse and of dense training by turns."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, ScoreFn, Where
from jaxprune.masks import AnyPattern
from jaxprune.optim._moving import Rule, Seen, moving
from jaxprune.optim._selection import Fractions, Selection, fractions_of, scorer


def ac_dc(
    inner: optax.GradientTransformation,
    sparsity: Fractions,
    *,
    begin: int,
    end: int,
    sparse_steps: int,
    dense_steps: int,
    scores: ScoreFn = _trees.magnitudes,
    scope: str = "global",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Alternate compressed and decompressed phases (AC/DC), after a dense start and with a sparse end.

    A sparse phase prunes to `sparsity` anew at its first step and trains what is left; a dense phase
    trains all weights, those that come back from zero and without momentum.

    Args:
      inner: any optax transform.
      sparsity: fraction to remove: a number, a tree of them, or a function of the parameters that gives
        one.
      begin: first step of the first sparse phase; dense before.
      end: from this step on sparse for good, above `begin`.
      sparse_steps: length of a sparse phase, at least 1.
      dense_steps: length of a dense phase, at least 1.
      scores: `params -> scores` or `(params, grads) -> scores`; magnitude by default.
      scope: `"global"` or `"leaf"`, see `jp.masks.from_scores`.
      pattern: see `jp.masks.from_scores`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are pruned; by default the weights.
      min_keep: weights that each leaf keeps at least, with `scope="leaf"`.

    Returns:
      A transform whose state is a `SparseState`.

    Raises:
      ValueError: steps or fractions out of range, an unknown scope, a `where` or pattern that does not
        fit the parameters (from `init`), or `params` missing (from `update`).
      TypeError: compressed leaves among those to prune (from `init`).

    Example:
      >>> params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> phases = dict(begin=1, end=7, sparse_steps=2, dense_steps=2)
      >>> tx = jp.optim.ac_dc(optax.sgd(0.1), 0.5, **phases)
      >>> state, seen = tx.init(params), []
      >>> for _ in range(9):
      ...     _, state = tx.update(params, state, params)
      ...     seen.append(jp.sparsity(jp.optim.get_masks(state)))
      >>> seen
      [0.0, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]

    Reference: Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
    Networks", 2021, https://arxiv.org/abs/2106.12379
    """
    _checks.positive_int("begin", begin, least=0)
    _checks.positive_int("sparse_steps", sparse_steps)
    _checks.positive_int("dense_steps", dense_steps)
    _checks.positive_int("end", end)
    if end <= begin:
        raise ValueError(f"end: expected a step after begin={begin}, got {end}")
    select = Selection(scope, pattern, uses, where, min_keep)
    score = scorer(scores, select)

    def is_sparse(step: Array) -> Array:
        phase = (step - begin) % (sparse_steps + dense_steps) < sparse_steps
        return ((step >= begin) & phase) | (step >= end)

    def due(step: Array, memory: dict[str, Any]) -> Array:
        return is_sparse(step) != memory["sparse"]

    def move(seen: Seen) -> tuple[Masks, dict[str, Any]]:
        sparse = is_sparse(seen.step)
        found = select.masks(score(seen.params, seen.grads), fractions_of(sparsity, seen.params))
        return jax.tree.map(lambda m: m | ~sparse, found), {"sparse": sparse}

    def start(params: Params) -> Masks:
        fractions_of(sparsity, params)
        return select.all_kept(params, score)

    memory = lambda _: {"sparse": jnp.array(False)}
    return moving(inner, Rule("ac_dc", start, move, due, memory))
