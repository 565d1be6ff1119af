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
