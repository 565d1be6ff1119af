"""Random masks that stay."""

import jax
import optax

from jaxprune._types import Where
from jaxprune.masks import AnyPattern
from jaxprune.optim._regrow import regrowing
from jaxprune.optim._selection import Fractions, Selection


def static_random(
    inner: optax.GradientTransformation,
    sparsity: Fractions,
    *,
    key: jax.Array,
    scope: str = "leaf",
    pattern: AnyPattern | None = None,
    uses: object = None,
    where: Where = None,
    min_keep: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Train a random sparse network: connections are drawn once, by `init`, and stay.

    The first update makes the others zero; for a sparse first forward pass too, begin with
    `jp.apply_masks(params, jp.optim.get_masks(opt_state))`.

    Args:
      inner: any optax transform.
      sparsity: fraction to remove: a number, a tree of them, or a function of the parameters that gives
        one, such as `lambda p: jp.budgets.erk(p, 0.9)`.
      key: of the random choice.
      scope: `"leaf"` (as many of each leaf) or `"global"`.
      pattern: see `jp.masks.from_scores`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are pruned; by default the weights.
      min_keep: weights that each leaf keeps at least; 0 with `scope="global"`.

    Returns:
      A transform whose state is a `SparseState`.

    Raises:
      ValueError: an unknown scope, a fraction out of range, a `where` or pattern that does not fit the
        parameters (from `init`), or `params` missing (from `update`).
      TypeError: compressed leaves among those to prune (from `init`).

    Example:
      >>> params = {"w": jnp.ones((4, 4))}
      >>> tx = jp.optim.static_random(optax.sgd(0.1), 0.75, key=jax.random.key(0))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int(jnp.sum(optax.apply_updates(params, updates)["w"] != 0))
      4

    Reference: Liu et al., "The Unreasonable Effectiveness of Random Pruning", 2022,
    https://arxiv.org/abs/2202.02643
    """
    min_keep = min_keep if scope == "leaf" else 0
    select = Selection(scope, pattern, uses, where, min_keep)
    return regrowing("static_random", inner, sparsity, key, grow=None, select=select)
