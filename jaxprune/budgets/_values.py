"""Budgets that a threshold gives which all leaves share."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import _checks, scores
from jaxprune._types import Params, PyTree, ScoreFn, Where
from jaxprune.budgets._share import Bound, Share, share_of


def global_(
    params: Params,
    sparsity: float,
    *,
    score_fn: ScoreFn = scores.magnitude,
    uses: Any = None,
    where: Where = None,
    max_sparsity: Bound = 1.0,
    min_keep: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> PyTree:
    """What one threshold on the scores of all leaves removes of each.

    Without bounds the same as `jp.masks.from_scores(score_fn(params), sparsity)`, as a budget; with
    bounds the threshold moves until the total is met.

    Args:
      params: any tree of arrays.
      sparsity: fraction to remove of the selected leaves together, in [0, 1].
      score_fn: `params -> scores`; magnitude by default.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves are pruned; by default the weights.
      max_sparsity: the most that a leaf may lose; or `{regular expression of paths: fraction}`.
      min_keep: entries that a leaf keeps at least; of stacked leaves (by `uses`) each layer.
      fixed: `{regular expression of paths: fraction to remove}`, for first and last layers; they count in
        the total.

    Returns:
      Tree like `params` of Python floats in [0, 1].

    Raises:
      ValueError: a sparsity outside [0, 1] or out of reach of the bounds, a pattern that matches nothing.
      TypeError: abstract parameters, which have no values.

    Example:
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0, 0.5, 5.0]])}
      >>> jp.budgets.global_(params, 0.5)
      {'a': 1.0, 'b': 0.25}
      >>> jp.budgets.global_(params, 0.5, max_sparsity=0.5)
      {'a': 0.5, 'b': 0.5}

    Reference: Han et al., "Learning both Weights and Connections", 2015,
    https://arxiv.org/abs/1506.02626
    """
    share = share_of(
        params,
        sparsity,
        uses=uses,
        where=where,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        fixed=fixed,
    )
    _check_concrete(share)
    found = share.treedef.flatten_up_to(score_fn(params))
    columns = [np.asarray(found[i], np.float64) for i in share.positions]
    for path, column, leaf in zip(share.paths, columns, share.leaves, strict=True):
        if column.shape != leaf.shape:
            raise ValueError(
                f"score_fn: leaf {path!r} of shape {leaf.shape} has scores of shape {column.shape}; "
                "score it, or leave it out by where="
            )
        if np.isnan(column).any():
            raise ValueError(
                f"score_fn: NaN in leaf {path!r}; look for a division by zero in the score"
            )
    ascending = [np.sort(_finite(column.ravel())) for column in columns]
    top = max((column[-1] for column in ascending), default=0.0)
    least = min((column[0] for column in ascending), default=0.0)
    above = lambda x, c: (len(x) - np.searchsorted(x, -c, side="left")) / len(x)
    return share.filled(
        lambda c: np.array([above(column, c) for column in ascending]),
        (-float(np.nextafter(top, np.inf)), -float(least)),
    )


def lamp(
    params: Params,
    sparsity: float,
    *,
    uses: Any = None,
    where: Where = None,
    max_sparsity: Bound = 1.0,
    min_keep: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> PyTree:
    """LAMP: what one threshold on `jp.scores.lamp` of all leaves removes of each.

    Args:
      params: any tree of arrays.
      sparsity: fraction to remove of the selected leaves together, in [0, 1].
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves are pruned; by default the weights.
      max_sparsity: the most that a leaf may lose; or `{regular expression of paths: fraction}`.
      min_keep: entries that a leaf keeps at least; of stacked leaves (by `uses`) each layer.
      fixed: `{regular expression of paths: fraction to remove}`, for first and last layers; they count in
        the total.

    Returns:
      Tree like `params` of Python floats in [0, 1].

    Raises:
      ValueError: a sparsity outside [0, 1] or out of reach of the bounds, a pattern that matches nothing.
      TypeError: abstract parameters, which have no values.

    Example:
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": 100 * jnp.array([[3.0, 4.0, 0.5, 5.0]])}
      >>> jp.budgets.lamp(params, 0.5)
      {'a': 0.5, 'b': 0.5}

    Reference: Lee et al., "Layer-adaptive sparsity for the Magnitude-based Pruning", 2021,
    https://arxiv.org/abs/2010.07611
    """

    def score(params: Params) -> PyTree:
        return scores.lamp(params, uses=uses, where=where)

    return global_(
        params,
        sparsity,
        score_fn=score,
        uses=uses,
        where=where,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        fixed=fixed,
    )


def _check_concrete(share: Share) -> None:
    for path, leaf in zip(share.paths, share.leaves, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct) or _checks.is_traced(leaf):
            raise TypeError(
                f"params: leaf {path!r} has no value, which this budget is made of; give the parameters "
                "outside jit, or take jp.budgets.erk, for which shapes suffice"
            )


def _finite(x: np.ndarray) -> np.ndarray:
    """Infinite scores as the largest numbers that bisection can halve the sum of."""
    most = np.finfo(np.float64).max / 4
    return np.clip(x, -most, most)
