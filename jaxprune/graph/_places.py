"""Where the units of a group lie in the parameters."""

from typing import NamedTuple

import numpy as np

from jaxprune.graph._groups import Group
from jaxprune.graph._trace import Graph


class Place(NamedTuple):
    """Where units of a group lie in a leaf.

    Attributes:
      leaf: position of the leaf.
      axis: axis of the leaf.
      slices: numbers of slices along it.
      units: the unit of each, counted within the group.
    """

    leaf: int
    axis: int
    slices: np.ndarray
    units: np.ndarray


def places_of(graph: Graph, group: Group) -> list[Place]:
    """Where the units of a group lie."""
    order = np.full(len(graph.solution.reason), -1)
    order[group.units] = np.arange(group.size)
    position = {path: i for i, path in enumerate(graph.paths)}
    found = []
    for path, axis in group.members:
        leaf = position[path]
        slices, unit = graph.solution.factors(graph.solution.label[graph.own[leaf].ids[axis]])
        mine = order[unit] >= 0
        found.append(Place(leaf, axis, slices[mine], order[unit[mine]]))
    return found


def frozen_places(graph: Graph) -> list[tuple[int, list[Place]]]:
    """Axes of parameters that hold the same units, of those that cannot be removed: how many, and where.

    They may still be scaled or permuted together.
    """
    solution = graph.solution
    found: dict[bytes, tuple[int, list[Place]]] = {}
    for leaf, axes in enumerate(graph.own):
        for axis, ids in enumerate(axes.ids):
            slices, unit = solution.factors(solution.label[ids])
            mine = solution.reason[unit] >= 0
            units, order = np.unique(unit[mine], return_inverse=True)
            if len(units):
                place = Place(leaf, axis, slices[mine], order.reshape(-1))
                found.setdefault(units.tobytes(), (len(units), []))[1].append(place)
    return list(found.values())
