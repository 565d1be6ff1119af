"""A budget from outliers among products of weights and inputs."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune import _checks, _trees, scores
from jaxprune._types import Params, PyTree, Where
from jaxprune.budgets._share import Bound, Share, share_of


def owl(
    params: Params,
    stats: PyTree,
    sparsity: float,
    *,
    threshold: float = 5.0,
    deviation: float = 0.08,
    blocks: str | None = None,
    uses: Any = None,
    where: Where = None,
    max_sparsity: Bound = 1.0,
    min_keep: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> PyTree:
    """OWL: leaves with more outliers stay denser, within `deviation` of the rest.

    The outlier ratio of a leaf is the fraction of its entries whose `|w| |x|` (`jp.scores.wanda`) is
    above `threshold` times the mean of the leaf (of each layer, where it is a stack). Densities are
    those ratios, brought onto a range of width `2 deviation`, and shifted to the total.

    Args:
      params: any tree of arrays.
      stats: of `jp.calibrate` on the same tree.
      sparsity: fraction to remove of the selected leaves together, in [0, 1].
      threshold: the paper's M.
      deviation: the paper's λ, at least 0.
      blocks: a regular expression of paths with a group, such as `r"(.*layers_\\d+)/.*"`: leaves with the
        same group share one density, as in the paper. By default each leaf has its own.
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

    Example:
      >>> params = {"even": jnp.ones((8, 8)), "odd": jnp.ones((8, 8)).at[0, 0].set(99.0)}
      >>> fn = lambda p, x: x @ p["even"] @ p["odd"]
      >>> stats = jp.calibrate(fn, params, [jnp.ones((4, 8))])
      >>> budget = jp.budgets.owl(params, stats, 0.5)
      >>> {k: round(s, 2) for k, s in budget.items()}
      {'even': 0.58, 'odd': 0.42}

    Reference: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", 2023,
    https://arxiv.org/abs/2310.05175
    """
    _checks.positive("threshold", threshold)
    if not 0.0 <= deviation <= 1.0:
        raise ValueError(f"deviation: expected a number in [0, 1], got {deviation}")
    share = share_of(
        params,
        sparsity,
        uses=stats if uses is None else uses,
        where=where,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        fixed=fixed,
    )
    own = set(share.paths)
    products = scores.wanda(params, stats, where=lambda path, _: path in own)
    found = share.treedef.flatten_up_to(products)
    ratios = np.array(
        [
            _ratio(path, found[i], use.stacked, threshold)
            for i, path, use in zip(share.positions, share.paths, share.uses, strict=True)
        ]
    )
    ratios = _by_block(share, ratios, blocks)
    width = np.ptp(ratios) if len(ratios) else 0.0
    level = (ratios - ratios.min()) / width if width > 0 else np.zeros(len(ratios))
    return share.shifted(2 * deviation * level)


def _ratio(path: str, score: Any, stacked: tuple[int, ...], threshold: float) -> float:
    """The fraction of outliers of a leaf."""
    if not np.ndim(score):
        raise ValueError(
            f"stats: nothing was multiplied by leaf {path!r}; calibrate on data that reaches it, or "
            "leave it out by where="
        )
    score = np.asarray(score, np.float64)
    layer = tuple(i for i in range(-score.ndim, 0) if i not in stacked)
    return float(np.mean(score > threshold * score.mean(layer, keepdims=True)))


def _by_block(share: Share, ratios: np.ndarray, blocks: str | None) -> np.ndarray:
    """Each leaf's ratio, or the mean over its block, weighted by size."""
    if blocks is None:
        return ratios
    regex = _trees.compile_pattern(blocks, parameter="blocks")
    if regex.groups < 1:
        raise ValueError(f"blocks: expected a group in {blocks!r}, such as '(.*layers_[0-9]+)/.*'")
    names = [_name(regex, path) for path in share.paths]
    if all(name == path for name, path in zip(names, share.paths, strict=True)):
        raise ValueError(_trees.no_match(blocks, share.paths, parameter="blocks"))
    out = ratios.copy()
    for name in set(names):
        own = [i for i, other in enumerate(names) if other == name]
        out[own] = np.average(ratios[own], weights=share.sizes[own])
    return out


def _name(regex: re.Pattern[str], path: str) -> str:
    match = regex.fullmatch(path)
    return match.group(1) if match else path
