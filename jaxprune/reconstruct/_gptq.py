"""Quantization that makes up for its own error, from second moments (GPTQ)."""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree, Where
from jaxprune.quantize import QuantizedArray, Rules, Spec, quantize_with
from jaxprune.reconstruct._leaf_by_leaf import Seen, format_of, leaf_by_leaf, planned
from jaxprune.reconstruct._matrices import Layout, grams
from jaxprune.reconstruct._rounding import (
    Grid,
    known_grid,
    of_rows,
    per_entry,
    round_matrix,
    scales_before,
)
from jaxprune.reconstruct._solve import (
    block_size,
    check_options,
    padded,
    padded_factor,
    solved,
)

SCALES = ("absmax", "mse")
_PRUNED = 0.2  # of zeros


def gptq(
    params: Params,
    stats: PyTree,
    bits: int | None = None,
    *,
    group_size: int | None = 128,
    otherwise: str = "auto",
    symmetric: bool = True,
    dtype: Any = None,
    damping: float = 0.01,
    order: str = "activation",
    scale: str = "mse",
    masks: Masks | None = None,
    rules: Rules | None = None,
    where: Where = None,
) -> PyTree:
    """GPTQ: post-training quantization of weights, each rounding error made up for by later weights.

    Per matrix `W` with second moment `H = E[x xᵀ]` of what multiplies it, `min tr((W - Q)ᵀ H (W - Q))`
    over `Q` on the grid: input features are rounded one after another, and what the outputs lose is taken
    from the features still to come (the blocked recursion on the Cholesky factor of `H⁻¹`). Products,
    convolutions (im2col, grouped ones too), attention kernels, stacked layers and experts, each matrix
    with statistics of its own.

    Args:
      params: any tree of arrays.
      stats: of `jp.calibrate(fn, params, batches, second_moment=True)`.
      bits: 8, 4 or 2; 4 where neither it nor `dtype` is given.
      group_size, otherwise, symmetric, dtype, rules: as in `jp.quantize_tree`. Leaves that a rule names
        and nothing was seen to multiply (embeddings) are rounded to nearest.
      damping: what is added to the diagonal of `H`, as a fraction of its mean. Above 0 where fewer rows
        than features were seen.
      order: `"activation"` rounds the features of largest second moment first, `"given"` as they lie.
        Groups lie as ever, so that no index is stored; with `"activation"` their scales are those of the
        weights before any is changed.
      scale: `"mse"` chooses each scale to have the least squared error, weighted as the recursion weighs
        it; `"absmax"` reaches the largest magnitude.
      masks: of pruned `params`: what they remove stays exactly 0, and is made up for. Without, zeros are
        weights like others and get values.
      where: which leaves; by default those that were seen to multiply something.

    Returns:
      The tree with `QuantizedArray` leaves.

    Raises:
      ValueError: statistics without second moments or of another tree, a leaf named by `where` that
        nothing multiplied, a damping too small for a positive matrix, NaN or infinity, a group size that
        does not divide a leaf where `otherwise="error"`.

    Warns:
      UserWarning: pruned weights without their masks; matrices (experts) that no row was seen to
        multiply, which are rounded to nearest; leaves that groups do not divide.

    Example:
      >>> params = {"w": jax.random.normal(jax.random.key(0), (32, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (64, 32)) @ jnp.diag(jnp.linspace(0.1, 3, 32))
      >>> fn = lambda p, x: x @ p["w"]
      >>> stats = jp.calibrate(fn, params, [x], second_moment=True)
      >>> near, made_up = (jp.compressed(fn)(tree, x) - fn(params, x) for tree in (
      ...     jp.quantize_tree(params, 4), jp.gptq(params, stats, 4, group_size=None)))
      >>> bool(jnp.linalg.norm(made_up) < 0.9 * jnp.linalg.norm(near))
      True

    Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, https://arxiv.org/abs/2210.17323
    """
    check_options(damping, order)
    _checks.choice("scale", scale, SCALES)
    given = {"group_size": group_size, "otherwise": otherwise, "symmetric": symmetric}
    plan = planned(params, stats, format_of(bits, dtype, **given), rules, where, "gptq")
    kept = _kept(params, masks, plan.hits)
    moments = {i: grams(leaf.stat, leaf.layout) for i, leaf in plan.seen.items()}  # checked first
    how = _How(damping, order, scale == "mse")

    def one(x: Array, leaf: Seen) -> QuantizedArray:
        i = leaf.position
        return _rounded(x, kept[i], moments.pop(i), leaf.layout, leaf.spec, how)

    return leaf_by_leaf(plan, "rounded to nearest", one)


class _How(NamedTuple):
    damping: float
    order: str
    search: bool


def _kept(params: Params, masks: Masks | None, hits: list[bool]) -> list[Any]:
    """The mask of each leaf; a warning where pruned ones have none."""
    paths, leaves, treedef = _trees.flatten(params)
    if masks is not None:
        return treedef.flatten_up_to(_checks.masks_fit(masks, params))
    pairs = zip(paths, leaves, hits, strict=True)
    zeros = [path for path, leaf, hit in pairs if hit and _is_pruned(leaf)]
    if zeros:
        warnings.warn(
            f"gptq: a fifth or more of {len(zeros)} leaves is 0, such as {zeros[0]!r}, and gets values "
            "again; give the masks of pruned weights: masks=",
            stacklevel=3,
        )
    return [None] * len(leaves)


def _is_pruned(leaf: Any) -> bool:
    """Whether so many entries are 0 that a mask made them so."""
    return float(jnp.mean(jnp.asarray(_trees.dense(leaf)) == 0)) >= _PRUNED


def _rounded(
    x: Array, mask: Any, gram: Array, layout: Layout, spec: Spec, how: _How
) -> QuantizedArray:
    """One leaf."""
    group = spec.group_size or 0
    follows = group > 0 and how.order == "given" and _runs_along(layout, spec)
    wide = x.astype(jnp.float32)
    keep = None
    if mask is not None and np.ndim(mask):
        full_mask = jnp.broadcast_to(mask, x.shape)
        keep, wide = layout.split(full_mask), jnp.where(full_mask, wide, 0.0)
    searched = how.damping if how.search else None
    known = None if follows else scales_before(wide, gram, layout, spec, searched)
    matrices = layout.split(wide)
    full = None if known is None else per_entry(known, layout, spec)
    block = block_size(layout.features, group if follows else 0)
    unit = group if follows else block  # groups that begin find all their rows
    size = -(-layout.features // unit) * unit
    count = -(-layout.features // group) if follows else 0

    def one(w: Array, u: Array, ranks: Array, number: int) -> tuple[Array, Any]:
        n, outputs = w.shape
        if full is None:
            zeros = jnp.zeros((count, outputs))
            own = jnp.arange(size) // group
            grid = Grid(zeros + 1.0, None if spec.symmetric else zeros, own)
        else:
            grid = known_grid(full, number, ranks, size)
        w, grid = round_matrix(
            padded(w[ranks], size),
            padded_factor(u, size),
            grid,
            None if keep is None else padded(keep[number][ranks], size),
            spec=of_rows(spec),
            size=group if follows else 0,
            search=how.search,
            block=block,
        )
        return w[:n][jnp.argsort(ranks)], (grid if follows else None)

    made = solved(layout.path, matrices, gram, how.damping, how.order, one)
    dense = layout.join(jnp.stack([w for w, _ in made]))
    if known is None:
        sizes = [layout.shape[i] for i in layout.summed]
        sizes[-1] = -(-sizes[-1] // group)
        join = lambda rows: layout.join(jnp.stack(rows), tuple(sizes))
        scale = join([grid.scale for _, grid in made])
        known = scale, None if spec.symmetric else join([grid.zero for _, grid in made])
    return quantize_with(dense, *known, spec).astype(x.dtype)


def _runs_along(layout: Layout, spec: Spec) -> bool:
    """Whether groups are runs of features, as the statistics order them."""
    assert spec.group_axis is not None
    assert spec.group_size is not None
    whole = len(layout.summed) == 1 or layout.shape[layout.summed[-1]] % spec.group_size == 0
    return whole and spec.group_axis % len(layout.shape) == layout.summed[-1]
