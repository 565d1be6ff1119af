"""Scores of units, gathered from the scores of all entries of all their slices."""

from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import Masks, PyTree
from jaxprune.graph import Graph, Group, GroupWhere, Only, Place, chosen_groups

REDUCTIONS = ("kernels", "mean", "l1", "l2", "max", "first")
NORMALIZATIONS = ("mean", "none", "max", "sum", "gaussian")
_TINY = 1e-30


def score_units(
    leaves: Sequence[Any],
    places: list[Place],
    size: int,
    reduce: str,
    kernels: Collection[int] = (),
) -> Any:
    """One score per unit: NumPy arrays from NumPy leaves, JAX arrays from JAX leaves.

    Scores of `-inf` belong to entries that are masked already and do not count; a unit that has no others
    scores `-inf`. Leaves that score a scalar say nothing; a unit that nothing scores stays: `+inf`.
    """
    scored = [place for place in places if leaves[place.leaf].ndim]
    if reduce == "kernels":
        scored = [place for place in scored if place.leaf in kernels] or scored
    scored = scored[:1] if reduce == "first" else scored
    on_host = all(isinstance(x, np.ndarray) for x in leaves)
    xp: Any = np if on_host else jnp
    total = xp.full(size, -np.inf) if reduce == "max" else xp.zeros(size)
    count = xp.zeros(size)
    for place in scored:
        each, counts = _of_slices(leaves[place.leaf], place.axis, reduce, on_host)
        if reduce == "kernels":
            own = _gathered(xp.zeros(size), each, place, "add")
            known = _gathered(xp.zeros(size), counts, place, "add")
            total, count = total + own / xp.maximum(known, 1), count + (known > 0)
            continue
        total = _gathered(total, each, place, "max" if reduce == "max" else "add")
        count = _gathered(count, counts, place, "add")
    if not scored:
        return xp.full(size, np.inf)
    if reduce in ("kernels", "mean", "first"):
        total = total / xp.maximum(count, 1)
    total = xp.sqrt(total) if reduce == "l2" else total
    touched = np.bincount(np.concatenate([p.units for p in scored]), minlength=size) > 0
    return xp.where(touched, xp.where(count > 0, total, -np.inf), np.inf)


def _of_slices(x: Any, axis: int, reduce: str, on_host: bool) -> tuple[Any, Any]:
    """What each slice along an axis adds to the score of its unit, and of how many entries."""
    xp: Any = np if on_host else jnp
    wide = np.float64 if on_host else None
    rest = tuple(i for i in range(x.ndim) if i != axis)
    if on_host and not np.isneginf(np.min(x, initial=0)):
        counts = np.full(x.shape[axis], x.size // x.shape[axis])
    else:
        known = x > -np.inf
        counts, x = known.sum(axis=rest), xp.where(known, x, -np.inf if reduce == "max" else 0)
    if reduce == "max":
        return x.max(axis=rest), counts
    if reduce == "l1":
        return xp.abs(x).sum(axis=rest, dtype=wide), counts
    return (x * x if reduce == "l2" else x).sum(axis=rest, dtype=wide), counts


def kernels_of(graph: Graph) -> frozenset[int]:
    """Positions of the leaves that products and convolutions use."""
    kinds = [uses.kind for uses in graph.treedef.flatten_up_to(graph.uses)]
    return frozenset(i for i, kind in enumerate(kinds) if kind in ("product", "convolution"))


def _gathered(total: Any, each: Any, place: Place, how: str) -> Any:
    if isinstance(total, np.ndarray):
        (np.maximum if how == "max" else np.add).at(total, place.units, each[place.slices])
        return total
    return getattr(total.at[place.units], how)(each[place.slices].astype(total.dtype))


def normalized(x: Any, how: str) -> Any:
    """Unit scores of a group on a scale that groups share; infinite ones stay."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    if how == "none":
        return x
    known = xp.isfinite(x)
    count = xp.maximum(known.sum(), 1)
    mean = xp.where(known, x, 0).sum() / count
    if how == "gaussian":
        deviation = xp.sqrt(
            xp.where(known, xp.square(xp.where(known, x, 0) - mean), 0).sum() / count
        )
        return xp.where(known, (xp.where(known, x, 0) - mean) / xp.maximum(deviation, _TINY), x)
    sizes = xp.where(known, xp.abs(x), 0)
    scale = {"mean": sizes.sum() / count, "max": sizes.max(initial=0), "sum": sizes.sum()}[how]
    return x / xp.maximum(scale, _TINY)


def open_groups(
    graph: Graph, ignore: Sequence[str], *, only: Only = None, where: GroupWhere = None
) -> list[Group]:
    """The groups of units that `only` and `where` choose and `ignore` does not name."""
    chosen = chosen_groups(graph.groups, only=only, where=where)
    if only is not None or where is not None:
        stacked = [group for group in chosen if group.kind == "layers"]
        if stacked and len(stacked) == len(chosen):
            raise ValueError(
                f"only, where: {stacked[0].label!r} are stacked layers, which structure.layer_masks "
                "removes; choose units, such as 'neurons'"
            )
    closed: set[str] = set()
    for pattern in [ignore] if isinstance(ignore, str) else ignore:
        regex = _trees.compile_pattern(pattern, parameter="ignore") if pattern else None
        hits = {
            group.name
            for group in graph.groups
            if pattern in (group.name, group.label, group.kind)
            or (regex is not None and any(regex.fullmatch(path) for path, _ in group.members))
        }
        if not hits and not (regex and any(regex.fullmatch(path) for path in graph.paths)):
            raise ValueError(_trees.no_match(pattern, graph.paths, parameter="ignore"))
        closed |= hits
    return [g for g in chosen if g.name not in closed and g.kind != "layers"]


def like_params(graph: Graph) -> PyTree:
    """A tree of the structure of the traced parameters."""
    return graph.treedef.unflatten(graph.paths)


def masks_without(graph: Graph, units: np.ndarray) -> Masks:
    """Masks that remove some units, given per component whether it goes."""
    removed = graph.solution.removed(units)
    masks = []
    for axes, shape in zip(graph.own, graph.shapes, strict=True):
        mask = np.ones((1,) * len(shape), bool)
        for axis, ids in enumerate(axes.ids):
            flags = removed[ids]
            if flags.any():
                mask = mask & ~flags.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        masks.append(jnp.asarray(mask if not mask.all() else True))
    return graph.treedef.unflatten(masks)
