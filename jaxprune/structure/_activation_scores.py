"""Scores of units from statistics: what share of its readers' outputs comes from each."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree
from jaxprune.graph import Graph, Group, GroupWhere, Only, Place, chosen_groups, places_of
from jaxprune.scores import per_entry
from jaxprune.structure._scoring import kernels_of


def activation_scores(
    graph: Graph,
    params: Params,
    stats: PyTree,
    *,
    centered: bool = False,
    by: str = "share",
    only: Only = None,
    where: GroupWhere = None,
) -> dict[str, np.ndarray]:
    """Score units by the share of what their readers compute that comes from them.

    A reader is a weight that sums over the units in a product or a convolution. Of its output o, feature
    f contributes the energy `w[f, o]² E[x[f]²]`; the score of unit u is the part that its features have,
    averaged over the outputs, and of several readers (a residual stream has many) or stacked layers the
    largest counts:

        score[u] = max over readers of mean over o of (sum over f in u of energy[f, o]) / (sum over all f)

    A share has no unit, so that groups compare: scales that cancel (producers times c, readers over c)
    change nothing, nor do scales of the outputs, such as those of a batch normalisation, folded or not.
    Units that no weight reads (dimensions of queries and keys, which multiply each other) have the
    product of the energies of the weights that make them, as a share of their group's.

    Args:
      graph: from `jp.trace`.
      params: the traced parameters.
      stats: of `jp.calibrate` on them.
      centered: use variances instead of mean squares: what a unit's removal changes if its mean goes into
        the biases, by `jp.calibration.correct_biases`.
      by: `"share"`, as above; or what is seen of the activations alone: `"max"`, the largest |x| over all
        rows, or `"rms"`, the root of the mean of x² (Minitron's and LLM-Pruner's measures). Of a unit of
        several features, such as a head, the same over them; of several readers the largest. Their scale
        is that of the activations, so that groups do not compare: use `scope="leaf"`. Groups that
        nothing reads have no such score.
      only, where: the groups to score, see `unit_masks`; all by default.

    Returns:
      Scores of units, float64 (units,), by name of the group, for `unit_masks(unit_scores=)`.
      Groups that no product or convolution touches, such as positions that are looked up, have none:
      they stay whole.

    Raises:
      ValueError: parameters or statistics of another tree or other shapes, a group whose weights were
        not calibrated, no group at all that has scores, or kinds and patterns that fit no group.

    Example:
      >>> tree = {"a": jnp.array([[3.0, 1.0]]), "b": jnp.array([[0.5], [2.0]])}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> x = jnp.ones((4, 1))
      >>> graph, stats = jp.trace(fn, tree, x), jp.calibrate(fn, tree, [x])
      >>> found = jp.structure.activation_scores(graph, tree, stats)
      >>> found["a[1]"].round(2).tolist()  # 1.5² and 2² of 6.25
      [0.36, 0.64]
      >>> jp.structure.unit_masks(graph, unit_scores=found, sparsity=0.5)["a"].tolist()
      [[False, True]]

    Reference: the energy is Wanda's (Sun et al. 2023, https://arxiv.org/abs/2306.11695), gathered by
    units and divided by its reader's.
    """
    _checks.choice("by", by, ("share", "max", "rms"))
    if by != "share" and centered:
        raise ValueError('centered: only for by="share"; leave it out')
    leaves = _leaves_of(graph, params)
    found = _stats_of(graph, stats)
    kernels = kernels_of(graph)
    energies: dict[int, np.ndarray] = {}
    scores = {}
    for group in chosen_groups(graph.groups, only=only, where=where):
        places = [p for p in places_of(graph, group) if p.leaf in kernels]
        if group.kind == "layers" or not places:
            continue
        _check_calibrated(graph, group, places, found)
        places = [p for p in places if np.any(np.asarray(found[p.leaf].count))]
        for p in places:
            if p.leaf not in energies:
                path = graph.paths[p.leaf]
                energies[p.leaf] = _energy(path, leaves[p.leaf], found[p.leaf], centered)
        readers = [p for p in places if p.axis - energies[p.leaf].ndim in found[p.leaf].axes]
        if by != "share":
            if readers:
                own = [
                    _seen(found[p.leaf], energies[p.leaf].shape, p, group.size, by) for p in readers
                ]
                scores[group.name] = np.max(own, axis=0)
        elif readers:
            each = [_shares(energies[p.leaf], found[p.leaf], p, group.size) for p in readers]
            scores[group.name] = np.max(each, axis=0)
        else:
            scores[group.name] = _made([(energies[p.leaf], p) for p in places], group.size)
    if not scores:
        raise ValueError(
            "graph: no product or convolution reads or makes units that can go; see graph.frozen for why"
        )
    return scores


def _leaves_of(graph: Graph, params: Params) -> list[Any]:
    try:
        leaves = graph.treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(f"params: of another tree than the traced one ({error})") from error
    for path, leaf, shape in zip(graph.paths, leaves, graph.shapes, strict=True):
        if np.shape(leaf) != tuple(shape):
            raise ValueError(
                f"params: leaf {path!r} has shape {np.shape(leaf)}, the traced one {tuple(shape)}"
            )
    return leaves


def _stats_of(graph: Graph, stats: PyTree) -> list[Any]:
    cure = "give what jp.calibrate(fn, params, batches) returned for these params"
    try:
        found = graph.treedef.flatten_up_to(stats)
    except ValueError as error:
        raise ValueError(f"stats: of another tree than the traced params; {cure}") from error
    for path, stat in zip(graph.paths, found, strict=True):
        if not hasattr(stat, "mean_square"):
            raise ValueError(f"stats: leaf {path!r} is a {type(stat).__name__}; {cure}")
    return found


def _check_calibrated(graph: Graph, group: Group, places: Sequence[Place], found: list) -> None:
    seen = [np.any(np.asarray(found[p.leaf].count)) for p in places]
    if not any(seen):
        names = ", ".join(dict.fromkeys(repr(graph.paths[p.leaf]) for p in places))
        raise ValueError(
            f"stats: nothing was recorded of {names}, which make or read the units of {group.name!r}; "
            "calibrate without where=, or with one that matches them"
        )


def _energy(path: str, leaf: Any, stat: Any, centered: bool) -> Float[np.ndarray, "..."]:
    """The energy that each entry of a weight adds to its output, over all rows that were seen."""
    w = np.asarray(_trees.dense(leaf), np.float64)
    x = np.asarray(stat.mean_square, np.float64)
    if centered:
        x = np.maximum(x - np.square(np.asarray(stat.mean, np.float64)), 0)
    count = np.asarray(stat.count, np.float64)
    x = x * count.reshape(count.shape + (1,) * (x.ndim - count.ndim))  # experts see different rows
    return np.square(w) * np.asarray(per_entry(path, w.shape, stat, jnp.asarray(x)), np.float64)


def _shares(
    energy: Float[np.ndarray, "..."], stat: Any, place: Place, size: int
) -> Float[np.ndarray, "units"]:
    """The share of each unit in the outputs of a reader: their mean, the largest of stacked ones."""
    n, lead = energy.ndim, np.ndim(stat.count)
    summed = tuple(axis % n for axis in stat.axes)
    totals = energy.sum(summed, keepdims=True)
    rest = tuple(axis for axis in summed if axis != place.axis)
    parts = energy.sum(rest, keepdims=True)
    parts = np.divide(parts, totals, out=np.zeros_like(parts), where=totals > 0)
    free = tuple(axis for axis in range(lead, n) if axis not in summed)
    by_slice = np.moveaxis(parts.mean(free, keepdims=True), place.axis, 0)
    by_slice = by_slice.reshape(by_slice.shape[0], -1)  # (slices, stacked)
    found = np.zeros((size, by_slice.shape[1]))
    np.add.at(found, place.units, by_slice[place.slices])
    return found.max(axis=1)


def _seen(
    stat: Any, shape: tuple[int, ...], place: Place, size: int, by: str
) -> Float[np.ndarray, "units"]:
    """The largest, or the root mean square, of the activations that a reader gets from each unit."""
    x = np.asarray(stat.absmax if by == "max" else stat.mean_square, np.float64)
    entries = per_entry("activations", shape, stat, jnp.asarray(x))
    each = np.moveaxis(np.broadcast_to(np.asarray(entries, np.float64), shape), place.axis, 0)
    each = each.reshape(len(each), -1)
    if by == "max":
        found = np.zeros(size)
        np.maximum.at(found, place.units, each.max(1)[place.slices])
        return found
    total, count = np.zeros(size), np.zeros(size)
    np.add.at(total, place.units, each.mean(1)[place.slices])
    np.add.at(count, place.units, 1)
    return np.sqrt(total / np.maximum(count, 1))


def _made(made: list[tuple[np.ndarray, Place]], size: int) -> Float[np.ndarray, "units"]:
    """The product of the energies of what makes units that nothing reads, as shares of their sum."""
    product = np.ones(size)
    for energy, place in made:
        own = np.zeros(size)
        others = tuple(axis for axis in range(energy.ndim) if axis != place.axis)
        np.add.at(own, place.units, energy.sum(others)[place.slices])
        product *= own / max(own.sum(), np.finfo(float).tiny)
    return product / max(product.sum(), np.finfo(float).tiny)
