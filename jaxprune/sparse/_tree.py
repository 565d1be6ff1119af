"""Trees of pruned weights, stored compactly."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree, Where, is_compressed
from jaxprune.sparse._array import LARGEST, SparseArray


def sparsify_tree(
    params: Params,
    *,
    n: int = 2,
    m: int = 4,
    axis: int | Literal["contracted"] = "contracted",
    masks: Masks | None = None,
    uses: Any = None,
    where: Where = None,
) -> PyTree:
    """Stores weights that are pruned in an N:M pattern without their zeros.

    `n` values of every `m`, and a bit for each of the m: 2:4 of float32 takes 0.53 of the dense bytes. In
    `jp.compressed`, products and convolutions run on what is stored; `quantize_tree` of the result
    quantizes the values.

    Args:
      params: pruned weights, as `jp.prune_tree(params, 0.5, pattern=jp.masks.NM(2, 4))` or training with
        such masks leaves them.
      n: at most so many of each group are not zero.
      m: neighbours in a group, at most 32.
      axis: along which groups lie, as in `jp.masks.NM`: by default the contracted one.
      masks: what is kept; by default what is not zero. With masks, kept weights that happen to be zero
        keep their place.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and their contracted axes.
      where: which leaves; by default all weights that have the pattern, others stay as they are.

    Returns:
      The tree with `SparseArray` leaves.

    Raises:
      ValueError: a leaf named by `where` that does not have the pattern or the axis, no leaf that has it,
        numbers out of range, masks of another tree.

    Example:
      >>> params = {"w": jnp.arange(1.0, 33.0).reshape(8, 4), "b": jnp.zeros(4)}
      >>> pruned, masks = jp.prune_tree(params, 0.5, pattern=jp.masks.NM(2, 4))
      >>> tree = jp.sparsify_tree(pruned)
      >>> tree["w"].nbytes / params["w"].nbytes
      0.53125
      >>> bool((tree["w"].materialize() == pruned["w"]).all())
      True
    """
    if isinstance(axis, str):
        _checks.choice("axis", axis, ("contracted",))
    _checks.positive_int("n", n)
    _checks.positive_int("m", m, least=2)
    if n > m or m > LARGEST:
        raise ValueError(f"n, m: expected n <= m <= {LARGEST}, got {n} and {m}")
    paths, leaves, treedef = _trees.flatten(params)
    if masks is not None:
        masks = _checks.masks_fit(masks, params)
    flags = [True] * len(leaves) if masks is None else treedef.flatten_up_to(masks)
    chosen = _trees.select(params, where, uses=uses)
    known = _trees.uses_of(params, uses)
    axes = [
        use.contracted_axis(_trees.rank(leaf)) if axis == "contracted" else axis
        for use, leaf in zip(known, leaves, strict=True)
    ]
    tried = [
        (i, kept)
        for i, (path, leaf, hit, flag) in enumerate(zip(paths, leaves, chosen, flags, strict=True))
        if hit and not is_compressed(leaf)
        for kept in [_kept(path, leaf, flag, n, m, axes[i], masks is not None, where is not None)]
        if kept is not None
    ]
    if not tried:
        raise ValueError(
            f"params: no leaf has at most {n} of every {m} entries along axis {axis} that are not zero; "
            f"prune first: jp.prune_tree(params, {1 - n / m:g}, pattern=jp.masks.NM({n}, {m}, {axis!r}))"
        )
    out = list(leaves)
    for i, kept in tried:
        x = leaves[i]
        at = axes[i] if axes[i] < 0 else axes[i] - x.ndim
        out[i] = _compact(jnp.asarray(x), kept, n=n, m=m, axis=at)
    return treedef.unflatten(out)


@partial(jax.jit, static_argnames=("n", "m", "axis"))
def _compact(x: Any, kept: Any, *, n: int, m: int, axis: int) -> SparseArray:
    return SparseArray.of(x, jnp.broadcast_to(kept, x.shape), n, m, axis)


def _kept(
    path: str, leaf: Any, flag: Any, n: int, m: int, axis: int, masked: bool, named: bool
) -> Any:
    """Which entries of a leaf are kept; `None` where it does not have the pattern."""
    if not -leaf.ndim <= axis < leaf.ndim:
        if named:
            raise ValueError(
                f"axis: leaf {path!r} of shape {leaf.shape} has no axis {axis}; leave it out with where="
            )
        return None
    kept = jnp.broadcast_to(flag, leaf.shape) if masked else leaf != 0
    if _checks.is_traced(kept):
        return kept
    most = _most(kept, m, axis)
    if most <= n:
        return kept
    if named:
        raise ValueError(
            f"params: leaf {path!r} has {most} of {m} entries along axis {axis} that are not zero, "
            f"expected at most {n}; prune it with pattern=jp.masks.NM({n}, {m}, {axis}), or leave it out"
        )
    return None


def _most(kept: Any, m: int, axis: int) -> int:
    """The most kept entries of any group."""
    flags = np.moveaxis(np.asarray(kept), axis, -1)
    pad = [(0, 0)] * (flags.ndim - 1) + [(0, -flags.shape[-1] % m)]
    flags = np.pad(flags, pad)
    return int(flags.reshape(*flags.shape[:-1], -1, m).sum(-1).max(initial=0))
