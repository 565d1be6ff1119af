"""Trees like the parameters without what masks remove: moments, averages, gradients, optimizer states."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import Masks, PyTree
from jaxprune.graph import Graph, Kept, Removal, reduced


def shrink(graph: Graph, masks: Masks, tree: PyTree) -> PyTree:
    """Any tree like the parameters, or that holds such trees, at the sizes that `jp.compact` gives them.

    Leaves are told by their paths: one whose path ends in that of a parameter, and that has its shape
    (or one entry along some axes, as masks do), is cut as the parameter is. So the state of an optimizer,
    or a whole train state, goes on after compaction without a warm-up. All other leaves stay as they are.

    Args:
      graph: from `jp.trace`, of the function that is compacted.
      masks: tree of bools like the traced parameters.
      tree: gradients, an average of the parameters, an optax state, a train state.

    Returns:
      The tree with smaller leaves; entries that are masked and stay are zero.

    Raises:
      ValueError: no leaf is like a parameter; a leaf of a removed parameter of another shape, such as
        factored moments, or one vector of all parameters.

    Example:
      >>> tree = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], tree, jnp.ones((1, 1)))
      >>> masks = jp.structure.keep_units(graph, {"a[1]": [True, False, True]})
      >>> small = jp.structure.shrink(graph, masks, {"step": 3, "mu": tree})
      >>> small["mu"]["a"].shape, small["step"]
      ((1, 2), 3)
    """
    kept = reduced(graph, graph.removal(masks)).kept
    flags = graph.treedef.flatten_up_to(masks)
    position = {path: i for i, path in enumerate(graph.paths)}
    total = sum(int(np.prod(shape)) for shape in graph.shapes)
    paths, leaves, treedef = _trees.flatten(tree)
    found, hits = list(leaves), 0
    for k, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        i = _parameter_of(path, position)
        if i is None:
            if np.shape(leaf) == (total,) and len(graph.paths) > 1:
                raise ValueError(
                    f"tree: leaf {path!r} is one vector of all parameters, which cannot be cut; start "
                    "that optimizer anew on the small parameters"
                )
            continue
        shape, full = np.shape(leaf), graph.shapes[i]
        if len(shape) == len(full) and all(n in (m, 1) for n, m in zip(shape, full, strict=True)):
            hits += 1
            own = zip(shape, kept[i], strict=True)
            own_mask = flags[i] if shape == full else True
            found[k] = cut(leaf, own_mask, tuple(x if len(x) <= n else x[:n] for n, x in own))
        elif np.size(leaf) != 1 and any(len(x) < n for x, n in zip(kept[i], full, strict=True)):
            raise ValueError(
                f"tree: leaf {path!r} has shape {shape}, its parameter {graph.paths[i]!r} {full}; only "
                "leaves of the same shape can be cut: start that part anew on the small parameters"
            )
    if not hits:
        raise ValueError(_trees.no_match(graph.paths[0], paths, parameter="tree"))
    return treedef.unflatten(found)


def _parameter_of(path: str, position: dict[str, int]) -> int | None:
    """The parameter whose path a path ends in."""
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts) + 1))
    return next((position[end] for end in ends if end in position), None)


def cut(param: Any, mask: Any, left: Kept) -> Any:
    """What is left of a leaf, its masked entries zero.

    On the host: eager JAX would compile each of a hundred shapes.
    """
    keep = np.asarray(mask)
    whole = all(len(index) == n for index, n in zip(left, np.shape(param), strict=True))
    if whole and keep.all():
        return param
    x = np.asarray(param)
    keep = keep.reshape((1,) * (x.ndim - keep.ndim) + keep.shape)
    for axis, index in enumerate(left):
        if len(index) < x.shape[axis]:
            x = np.take(x, index, axis=axis)
            if keep.shape[axis] > 1:
                keep = np.take(keep, index, axis=axis)
    if not keep.all():
        x = np.where(keep, x, np.zeros((), x.dtype))
    return jnp.asarray(x)


def stuck_slices(graph: Graph, removal: Removal, masks: list[Any]) -> dict[str, tuple[int, str]]:
    """Slices that are masked as units are, along whole axes, and cannot go: how many, and why, by axis.

    Masks that also hide single entries ask for no slices to go, nor do those of whole leaves.
    """
    reasons = dict(graph.frozen)
    found = {}
    for i, (path, shape, mask) in enumerate(zip(graph.paths, graph.shapes, masks, strict=True)):
        keep = np.asarray(mask)
        keep = np.broadcast_to(keep.reshape((1,) * (len(shape) - keep.ndim) + keep.shape), shape)
        if keep.all() or i in removal.fully_masked:
            continue
        rest = [tuple(j for j in range(len(shape)) if j != axis) for axis in range(len(shape))]
        live = [keep.any(axis=r) for r in rest]
        if not keep[np.ix_(*live)].all():
            continue
        for axis, flags in enumerate(live):
            stays = ~flags & ~removal.ids[graph.own[i].ids[axis]]
            if stays.any() and (path, axis) in reasons:
                found[f"{path}[{axis}]"] = (int(stays.sum()), reasons[path, axis])
    return found
