"""Masked units removed for good: a smaller function and smaller parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params
from jaxprune.graph import (
    Axes,
    Graph,
    Units,
    evaluate,
    plan_of,
    trace,
)


def compact(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *args: Any,
    updates: Callable[[Any], Any] | None = None,
) -> tuple[Callable[..., Any], Params]:
    """Removes every unit all of whose slices are masked.

    `small_fn(small_params, *args)` equals `fn(apply_masks(params, masks), *args)` up to rounding, for any
    batch size. Entries that are masked without their unit are set to zero and stay.

    Args:
      fn: `fn(params, *args)`, any traceable function.
      params: its parameters.
      masks: tree of bools with the structure of `params`.
      *args: example inputs.
      updates: the part of the output that is an updated copy of parameters, see `jp.trace`.

    Returns:
      `(small_fn, small_params)`; both jit, differentiate and map like the originals.

    Raises:
      ValueError: masks of another tree, or masks that leave an axis without any entry.

    Example:
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> keep = jnp.arange(8) < 6
      >>> masks = {"a": keep[None], "b": keep[:, None]}
      >>> small_fn, small = jp.compact(fn, params, masks, jnp.ones((1, 4)))
      >>> small["a"].shape, small["b"].shape
      ((4, 6), (6, 2))
    """
    _checks.masks_fit(masks, params)
    graph = trace(fn, params, *args, updates=updates)
    dead = dead_slices(graph, masks)
    removed = graph.units.removed(gone_units(graph.units, graph.own, dead))
    kept = [tuple(np.flatnonzero(~removed[ids]) for ids in axes.ids) for axes in graph.own]
    for path, shape, left in zip(graph.paths, graph.shapes, kept, strict=True):
        for axis, (n, index) in enumerate(zip(shape, left, strict=True)):
            if n and not len(index):
                raise ValueError(
                    f"masks: nothing is left of axis {axis} of leaf {path!r}; keep at least one unit"
                )
    leaves = graph.treedef.flatten_up_to(params)
    flags = graph.treedef.flatten_up_to(masks)
    small = [_cut(*item) for item in zip(leaves, flags, kept, strict=True)]
    full = graph.treedef.unflatten(
        jax.ShapeDtypeStruct(shape, leaf.dtype)
        for shape, leaf in zip(graph.shapes, leaves, strict=True)
    )
    return _small_fn(fn, full, kept, updates), graph.treedef.unflatten(small)


def _cut(param: Any, mask: Any, left: tuple[np.ndarray, ...]) -> jax.Array:
    """What is left of a leaf, its masked entries zero.

    On the host: eager JAX would compile each of a hundred shapes.
    """
    x, keep = np.asarray(param), np.asarray(mask)
    for axis, index in enumerate(left):
        if len(index) < x.shape[axis]:
            x = np.take(x, index, axis=axis)
            if keep.ndim and keep.shape[axis - x.ndim] > 1:
                keep = np.take(keep, index, axis=axis - x.ndim)
    if not keep.all():
        x = np.where(keep, x, np.zeros((), x.dtype))
    return jnp.asarray(x)


def dead_slices(graph: Graph, masks: Masks) -> list[list[np.ndarray]]:
    """Per leaf and axis which slices are wholly masked."""
    found: list[list[np.ndarray]] = []
    for shape, mask in zip(graph.shapes, graph.treedef.flatten_up_to(masks), strict=True):
        full = np.broadcast_to(np.asarray(mask), shape)
        others = [tuple(i for i in range(len(shape)) if i != axis) for axis in range(len(shape))]
        found.append([np.asarray(~full.any(axis=rest)) for rest in others])
    return found


def gone_units(units: Units, own: list[Axes], dead: list[list[np.ndarray]]) -> np.ndarray:
    """The units that go: those of which no slice of a parameter is left.

    Args:
      units: the solved facts.
      own: axes of each parameter leaf.
      dead: per leaf and axis one bool per slice.
    """
    held, seen = np.zeros(len(units.why), bool), np.zeros(len(units.why), bool)
    for axes, flags in zip(own, dead, strict=True):
        for ids, flag in zip(axes.ids, flags, strict=True):
            position, unit = units.factors(units.label[ids])
            seen[unit] = True
            held[unit[~flag[position]]] = True
    return seen & ~held & (units.why < 0)


def _small_fn(
    fn: Callable[..., Any],
    full: Params,
    kept: list[tuple[np.ndarray, ...]],
    updates: Callable[[Any], Any] | None,
) -> Callable[..., Any]:
    """`fn` at smaller sizes; traced anew, and coupled anew, for each shape of inputs."""
    cache: dict[Any, Any] = {}

    def plan(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        key = (treedef, tuple((np.shape(x), jnp.result_type(x)) for x in leaves))
        if key not in cache:
            graph = trace(fn, full, *args, updates=updates, **kwargs)
            dead = [
                [
                    ~np.isin(np.arange(len(ids)), index)
                    for ids, index in zip(a.ids, left, strict=True)
                ]
                for a, left in zip(graph.own, kept, strict=True)
            ]
            removed = graph.units.removed(gone_units(graph.units, graph.own, dead))
            cache[key] = plan_of(graph.program, graph.axes, graph.bodies, removed)
        return cache[key]

    def small_fn(params: Params, *args: Any, **kwargs: Any) -> Any:
        found = plan(args, kwargs)
        inputs = [*_trees.flatten(params)[1], *jax.tree.leaves((args, kwargs))]
        return found.program.out_tree.unflatten(evaluate(found, inputs))

    return small_fn
