"""Pruning that makes up for what it removes, from second moments (SparseGPT)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._progress import track
from jaxprune._types import Masks, Params, PyTree, Where
from jaxprune.masks import NM, Block, pattern_on
from jaxprune.quantize import Misfits, Spec, quantize_with, refuse_non_finite
from jaxprune.reconstruct._matrices import Layout, chosen_leaves, grams, layout_of, tell_unseen
from jaxprune.reconstruct._removing import Choice, prune_matrix
from jaxprune.reconstruct._rounding import known_grid, of_rows, per_entry, scales_before
from jaxprune.reconstruct._solve import check_options, padded, padded_factor, solved


def sparsegpt(
    params: Params,
    stats: PyTree,
    sparsity: float | PyTree | None,
    *,
    pattern: Any = None,
    damping: float = 0.05,
    order: str = "given",
    block_size: int = 128,
    spec: Spec | int | None = None,
    where: Where = None,
) -> tuple[Params, Masks]:
    """SparseGPT: post-training pruning in one pass, the kept weights made up for the removed ones.

    Per matrix `W` with second moment `H = E[x xᵀ]` of what multiplies it: feature by feature the weights
    of least `w² / u_jj²` are removed, with `uᵀ u = H⁻¹`, and what the outputs lose is taken from the
    features still to come. Products, convolutions (im2col, grouped ones too), attention kernels, stacked
    layers and experts, each matrix with statistics of its own and with the same sparsity.

    Args:
      params: any tree of arrays.
      stats: of `jp.calibrate(fn, params, batches, second_moment=True)`.
      sparsity: fraction of each matrix to remove, in [0, 1], or a tree of such (see `jp.budgets`);
        `None` with `NM`, which says it.
      pattern: `None` (single weights), `jp.masks.NM`, or `jp.masks.Block` whose extents divide the leaf.
      damping: what is added to the diagonal of `H`, as a fraction of its mean.
      order: `"given"` or, without pattern, `"activation"`: the features of largest second moment first.
      block_size: features among whose weights the removed ones are chosen together.
      spec: quantizes what is kept in the same pass: a `jp.quantize.Spec` or bits.
      where: which leaves; by default those that were seen to multiply something.

    Returns:
      `(params, masks)`: kept weights changed, the others exactly 0; with `spec`, `QuantizedArray` leaves.
      Of each layer's matrix, or of its pieces, exactly `round((1 - sparsity) · size)` stay.

    Raises:
      ValueError: as `jp.gptq`; a sparsity outside [0, 1] or another than that of the pattern, a pattern
        that does not fit a leaf.
      TypeError: a pattern of another kind.

    Warns:
      UserWarning: matrices (experts) that no row was seen to multiply, which are pruned by magnitude.

    Example:
      >>> params = {"w": jax.random.normal(jax.random.key(0), (32, 8))}
      >>> x, mix = (jax.random.normal(jax.random.key(i), (s, 32)) for i, s in ((1, 64), (2, 32)))
      >>> x = x @ mix
      >>> fn = lambda p, x: x @ p["w"]
      >>> stats = jp.calibrate(fn, params, [x], second_moment=True)
      >>> pruned, masks = jp.sparsegpt(params, stats, 0.5)
      >>> plain, _ = jp.prune_tree(params, 0.5)
      >>> loss = lambda p: jnp.linalg.norm(fn(p, x) - fn(params, x))
      >>> jp.sparsity(masks), bool(loss(pruned) < 0.9 * loss(plain))
      (0.5, True)

    Reference: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", 2023, https://arxiv.org/abs/2301.00774
    """
    check_options(damping, order)
    _checks.positive_int("block_size", block_size)
    if pattern is not None and not isinstance(pattern, NM | Block):
        raise TypeError(
            f"pattern: expected None, NM or Block, got {type(pattern).__name__}; whole channels are "
            "removed by jp.structure.unit_masks and jp.compact"
        )
    if pattern is not None and order != "given":
        raise ValueError(f"order: {order!r} would part the pieces of {pattern}; use 'given'")
    paths, leaves, treedef, found, hits = chosen_leaves(params, stats, where, "sparsegpt")
    fractions = _fractions(sparsity, pattern, params, paths, treedef, hits)
    formats = Spec(bits=spec) if isinstance(spec, int) else spec
    ready, misfits = {}, Misfits()
    for i in (i for i, hit in enumerate(hits) if hit):
        shape = tuple(leaves[i].shape)
        layout = layout_of(paths[i], shape, found[i])
        own = None
        if formats is not None:
            own = misfits.fit(formats, paths[i], leaves[i], found[i].uses, is_read=True)
        choice = _choice(pattern_on(pattern, paths[i], shape, found[i].uses), layout)
        ready[i] = layout, choice, own, grams(found[i], layout)
    misfits.tell()
    tell_unseen("sparsegpt", "pruned by magnitude", [(found[i], r[0]) for i, r in ready.items()])
    out, masks = list(leaves), [jnp.array(True)] * len(leaves)
    for i in track(list(ready), "sparsegpt"):
        x = jnp.asarray(_trees.dense(leaves[i]))
        refuse_non_finite([paths[i]], [jnp.all(jnp.isfinite(x))])
        layout, choice, own, gram = ready.pop(i)
        out[i], masks[i] = _pruned(
            x, gram, layout, choice, own, fractions[i], damping, order, block_size
        )
    return treedef.unflatten(out), treedef.unflatten(masks)


def _fractions(
    sparsity: Any, pattern: Any, params: Params, paths: list[str], treedef: Any, hits: list[bool]
) -> list[float]:
    """The fraction to remove of each leaf."""
    if sparsity is None:
        if not isinstance(pattern, NM):
            raise ValueError("sparsity: expected a fraction in [0, 1] to remove, got None")
        return [pattern.sparsity] * len(paths)
    if _trees.leaf_paths(sparsity) == [""]:
        given = [sparsity] * len(paths)
    else:
        given = treedef.flatten_up_to(_checks.aligned("sparsity", sparsity, "params", params))
    for path, value, hit in zip(paths, given, hits, strict=True):
        if not hit:
            continue
        _checks.fraction(
            "sparsity" if len(set(map(id, given))) == 1 else f"sparsity of {path!r}", value
        )
        if _checks.is_traced(value):
            raise ValueError("sparsity: is traced; give a number, blocks are counted beforehand")
        if isinstance(pattern, NM) and abs(float(value) - pattern.sparsity) > 1e-6:
            raise ValueError(
                f"sparsity: {pattern} removes {pattern.sparsity:g}, got {float(value):g}; leave it out, "
                "or give another pattern"
            )
    return [float(value) if hit else 0.0 for value, hit in zip(given, hits, strict=True)]


def _choice(pattern: NM | Block | None, layout: Layout) -> Choice:
    """A pattern as it lies in the matrices of a leaf.

    Raises:
      ValueError: it lies along axes that matrices cut.
    """
    if pattern is None:
        return Choice()
    ndim = len(layout.shape)
    ends = layout.summed[-1], layout.outer[-1] if layout.outer else -1
    if isinstance(pattern, NM):
        assert isinstance(pattern.axis, int)
        axis = pattern.axis % ndim
        cut = len(layout.summed if axis == ends[0] else layout.outer) > 1 or (
            layout.groups > 1 and axis == ends[1]
        )
        if axis not in ends or (cut and layout.shape[axis] % pattern.m):
            raise ValueError(
                f"pattern: {pattern} does not fit leaf {layout.path!r} of shape {layout.shape}, whose "
                f"products sum over axes {layout.summed}; give the innermost of them, of a size that "
                f"{pattern.m} divides, or leave it out with where="
            )
        return Choice(pattern.n, pattern.m, axis == ends[0])
    extents = dict(zip(range(ndim - len(pattern.shape), ndim), pattern.shape, strict=True))
    unit = extents.pop(ends[0], 1), extents.pop(ends[1], 1)
    outputs = layout.outputs
    whole = layout.shape[ends[0]] % unit[0] == 0 and outputs % unit[1] == 0
    whole = whole and (ends[1] < 0 or layout.shape[ends[1]] % unit[1] == 0)
    if any(n > 1 for n in extents.values()) or not whole:
        raise ValueError(
            f"pattern: {pattern} does not fit leaf {layout.path!r} of shape {layout.shape}, whose "
            f"products sum over axes {layout.summed}; extents divide the innermost "
            "summed axis and the innermost other one, and are 1 along the rest; or leave the leaf out "
            "with where="
        )
    return Choice(unit=unit)


def _counts(layout: Layout, choice: Choice, fraction: float, block: int) -> np.ndarray:
    """How many pieces each block removes, (groups, blocks): in all exactly what the fraction asks for."""
    a, b = choice.unit
    rows, across = layout.features // a, layout.outputs // b
    total = rows * across * layout.groups
    removed = total - round((1.0 - fraction) * total)
    blocks = -(-layout.features // block)
    through = np.minimum(np.arange(1, blocks + 1) * (block // a), rows)
    through = (np.arange(layout.groups)[:, None] * rows + through).reshape(-1)
    upto = (removed * through + rows * layout.groups // 2) // (rows * layout.groups)
    return np.diff(upto, prepend=0).astype(np.int32).reshape(layout.groups, blocks)


def _pruned(
    x: Array,
    gram: Array,
    layout: Layout,
    choice: Choice,
    spec: Spec | None,
    fraction: float,
    damping: float,
    order: str,
    wanted: int,
) -> tuple[Any, Array]:
    """One leaf, and its mask."""
    wide = x.astype(jnp.float32)
    step = choice.m if choice.m and choice.along else 1
    unit = int(np.lcm(choice.unit[0], step))
    block = max(min(wanted, layout.features) // unit, 1) * unit
    size = -(-layout.features // block) * block
    counts = jnp.asarray(_counts(layout, choice, fraction, block))
    known = None if spec is None else scales_before(wide, gram, layout, spec, damping)
    full = None if known is None or spec is None else per_entry(known, layout, spec)

    def one(w: Array, u: Array, ranks: Array, number: int) -> tuple[Array, Array]:
        n, grid = layout.features, None
        if full is not None:
            grid = known_grid(full, number, ranks, size)
        made, mask = prune_matrix(
            padded(w[ranks], size),
            padded_factor(u, size),
            counts[number % layout.groups],
            grid,
            choice=choice,
            spec=None if spec is None else of_rows(spec),
            features=n,
            block=block,
            step=step,
        )
        back = jnp.argsort(ranks)
        return made[:n][back], mask[:n][back]

    made = solved(layout.path, layout.split(wide), gram, damping, order, one)
    dense, mask = (layout.join(jnp.stack(parts)) for parts in zip(*made, strict=True))
    if known is None:
        return dense.astype(x.dtype), mask
    assert spec is not None
    return quantize_with(dense, *known, spec).astype(x.dtype), mask
