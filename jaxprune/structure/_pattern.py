"""Whole units as a pattern: structured masks wherever masks are made from scores, also under jit."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxprune import _checks
from jaxprune._types import Masks, PyTree, Scores
from jaxprune.graph import Graph, GroupWhere, Only, places_of
from jaxprune.structure._scoring import (
    NORMALIZATIONS,
    REDUCTIONS,
    kernels_of,
    like_params,
    normalized,
    open_groups,
    score_units,
)


class Units:
    """Units of a graph as the pattern of `jp.masks.from_scores` and `jp.optim.gradual`.

    The masks remove whole channels, neurons and heads from every leaf that has them, biases included, so
    `jp.compact` removes them afterwards. `scope="leaf"` means each group by itself.

    Args:
      graph: from `jp.trace`, of the parameters that are pruned.
      reduce: how a unit's score comes from its entries, see `unit_masks`.
      normalize: how scores of groups are made comparable, see `unit_masks`.
      min_units: at least so many units of each group stay.
      only, where: which groups may shrink, see `unit_masks`.
      ignore: kinds, names and labels of groups and regular expressions of paths that stay whole.

    Raises:
      ValueError: an unknown name or kind, a `where` or `ignore` that matches nothing,
        or later scores of another tree.

    Example:
      >>> tree = {"a": jnp.array([[3.0, 1.0, 2.0, 4.0]]), "b": jnp.ones((4, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], tree, jnp.ones((1, 1)))
      >>> scores = jp.scores.magnitude(tree)
      >>> masks = jp.masks.from_scores(scores, 0.5, pattern=jp.structure.Units(graph))
      >>> masks["a"].tolist()
      [[True, False, False, True]]
    """

    def __init__(
        self,
        graph: Graph,
        *,
        reduce: str = "kernels",
        normalize: str = "none",
        min_units: int = 1,
        only: Only = None,
        where: GroupWhere = None,
        ignore: Sequence[str] = (),
    ) -> None:
        _checks.choice("reduce", reduce, REDUCTIONS)
        _checks.choice("normalize", normalize, NORMALIZATIONS)
        _checks.positive_int("min_units", min_units)
        self._graph, self._reduce, self._normalize = graph, reduce, normalize
        self._min_units = min_units
        self._kernels = kernels_of(graph) if reduce == "kernels" else frozenset()
        self._groups = open_groups(graph, ignore, only=only, where=where)
        self._places = [places_of(graph, group) for group in self._groups]

    @property
    def reasons(self) -> str:
        """Why axes of the traced parameters cannot go, of the first few."""
        few = [f"{path}[{axis}]: {why}" for (path, axis), why in self._graph.frozen[:4]]
        return "; ".join(few) or "all are ignored"

    def pool_tree(self, scores: Scores) -> PyTree:
        """Scores per unit, a list with one array per group, from scores per entry."""
        scores = _checks.aligned("scores", scores, "the traced params", like_params(self._graph))
        leaves = [jnp.asarray(x) for x in self._graph.treedef.flatten_up_to(scores)]
        found = []
        for group, places in zip(self._groups, self._places, strict=True):
            x = score_units(leaves, places, group.size, self._reduce, self._kernels)
            x = normalized(x, self._normalize)
            best = jnp.argsort(-x, stable=True)[: self._min_units]
            found.append(x.at[best].set(jnp.inf))
        return found

    def expand_tree(self, masks: PyTree) -> Masks:
        """Masks that broadcast to the parameters, from a list with one mask of units per group."""
        graph = self._graph
        keep: list[list[jnp.ndarray | None]] = [[None] * len(shape) for shape in graph.shapes]
        for mask, places in zip(masks, self._places, strict=True):
            for leaf, axis, slices, units in places:
                flags = jnp.ones(graph.shapes[leaf][axis], bool).at[slices].min(mask[units])
                old = keep[leaf][axis]
                keep[leaf][axis] = flags if old is None else old & flags
        found = []
        for shape, by_axis in zip(graph.shapes, keep, strict=True):
            full = jnp.asarray(True)
            for axis, flags in enumerate(by_axis):
                if flags is not None:
                    full = full & flags.reshape(np.where(np.arange(len(shape)) == axis, -1, 1))
            found.append(full)
        return graph.treedef.unflatten(found)
