"""Score, select and apply in one call."""

from typing import Any

import jax

from jaxprune import _trees
from jaxprune._types import Masks, Params, ScoreFn, Where
from jaxprune.masks._apply import apply_masks
from jaxprune.masks._from_scores import from_scores
from jaxprune.masks._patterns import NM, Pattern


def prune_tree(
    params: Params,
    sparsity: float | jax.Array | Any,
    *,
    scores: ScoreFn | None = None,
    scope: str = "global",
    pattern: Pattern | NM | None = None,
    uses: Any = None,
    where: Where = None,
    min_keep: int = 0,
) -> tuple[Params, Masks]:
    """Prunes parameters once: the fraction `sparsity` of the selected weights becomes zero.

    Args:
      params: any tree of arrays.
      sparsity: fraction to remove, in [0, 1]: a number, a traced scalar or a budget tree.
      scores: `params -> scores`; magnitude `|w|` by default.
      scope: `"global"` or `"leaf"`, see `jp.masks.from_scores`.
      pattern: `None`, `Block`, `Channel` or `NM`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie; see
        `jp.masks.from_scores`.
      where: which leaves are pruned; by default the weights: as `uses` says, else floating leaves with
        two axes or more that are no biases or norms by their names.
      min_keep: weights that each leaf keeps at least, with `scope="leaf"` or a budget tree.

    Returns:
      `(pruned, masks)`.

    Raises:
      ValueError: see `jp.masks.from_scores`; also a `where` pattern that matches nothing.

    Example:
      >>> params = {"w": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "b": jnp.ones(2)}
      >>> pruned, masks = jp.prune_tree(params, 0.5)
      >>> pruned["w"].tolist(), jp.sparsity(masks)
      ([[3.0, 0.0], [0.0, 2.0]], 0.5)
    """
    _trees.select(params, where, uses=uses)  # a bad `where` fails before any scoring
    found = (scores or _trees.magnitudes)(params)
    if scores is None or where is not None:
        found = _trees.restrict(found, params, where, uses=uses)
    masks = from_scores(found, sparsity, scope=scope, pattern=pattern, uses=uses, min_keep=min_keep)
    return apply_masks(params, masks), masks
