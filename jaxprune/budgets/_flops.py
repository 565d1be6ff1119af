"""A budget of FLOPs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune import _trees
from jaxprune._types import Params, PyTree, Where
from jaxprune.budgets._share import Bound, share_of


def flops(
    graph: Any,
    params: Params,
    sparsity: float,
    *,
    power: float = 0.5,
    where: Where = None,
    max_sparsity: Bound = 1.0,
    min_keep: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> PyTree:
    """Sparsity by cost: weights that a call uses more often are removed more, until FLOPs are met.

    A kernel entry of a convolution is used once for each pixel, that of a dense layer once for each row.
    The density of a leaf is proportional to `(FLOPs per entry)^-power`; a leaf that costs nothing, such
    as a table that is looked up, stays dense.

    Args:
      graph: of `jp.trace(fn, params, *args)`.
      params: the traced tree, or structs of it.
      sparsity: fraction to remove of the FLOPs of the selected leaves' products, in [0, 1].
      power: 0: the same density for all that cost; 1: densities inverse to the cost.
      where: which leaves are pruned; by default the weights.
      max_sparsity: the most that a leaf may lose; or `{regular expression of paths: fraction}`.
      min_keep: entries that a leaf keeps at least; of stacked leaves (by `uses`) each layer.
      fixed: `{regular expression of paths: fraction to remove}`, for first and last layers; they count in
        the total.
    Returns:
      Tree like `params` of Python floats in [0, 1].

    Raises:
      ValueError: a sparsity outside [0, 1] or out of reach of the bounds, a pattern that matches nothing.

    Example:
      >>> params = {"often": jnp.ones((4, 4)), "once": jnp.ones((4, 4))}
      >>> fn = lambda p, x: jnp.mean(x @ p["often"], 0) @ p["once"]
      >>> graph = jp.trace(fn, params, jnp.ones((9, 4)))
      >>> {k: round(s, 2) for k, s in jp.budgets.flops(graph, params, 0.5).items()}
      {'often': 0.56, 'once': 0.0}

    Reference: the trade-off of Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", 2018, https://arxiv.org/abs/1801.05787
    """
    if not 0.0 <= power <= 1.0:
        raise ValueError(f"power: expected a number in [0, 1], got {power}")
    if not hasattr(graph, "leaf_flops"):
        raise TypeError(f"graph: expected jp.trace(fn, params, *args), got {type(graph).__name__}")
    share = share_of(
        params,
        sparsity,
        uses=graph,
        where=where,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        fixed=fixed,
    )
    known = dict(zip(graph.paths, graph.leaf_flops, strict=True))
    odd = [path for path in _trees.leaf_paths(params) if path not in known]
    if odd:
        raise ValueError(
            f"graph: of another tree than params ({odd[0]!r} is not in it); trace anew"
        )
    costs = np.array([known[path] for path in share.paths], float)
    if not costs.any():
        raise ValueError(
            "graph: the selected leaves take part in no product; choose others by where="
        )
    used = np.where(costs > 0, costs / share.sizes, np.inf)
    wish = np.where(costs > 0, (used / used.min()) ** -power, 0.0)
    dense = share._replace(low=np.where(costs > 0, share.low, share.high))
    return dense.scaled(wish, costs)
