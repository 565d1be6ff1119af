"""What masks remove: units no slice of which is left, and leaves of which nothing is."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._constraints import Solution


class Removal(NamedTuple):
    """What goes.

    Attributes:
      units: per component whether that unit goes.
      ids: per id whether it goes.
      fully_masked: positions of leaves that are masked throughout.
    """

    units: np.ndarray
    ids: np.ndarray
    fully_masked: tuple[int, ...]


Flags = list[list[np.ndarray]]  # per leaf and axis one bool per slice


def masked_slices(shapes: tuple[tuple[int, ...], ...], masks: list[Any]) -> tuple[Flags, list[int]]:
    """Which slices are masked throughout, and which whole leaves.

    Args:
      shapes: shape of each leaf.
      masks: one per leaf, broadcastable to it.
    """
    found, fully_masked = [], []
    for position, (shape, mask) in enumerate(zip(shapes, masks, strict=True)):
        keep = np.asarray(mask)
        keep = keep.reshape((1,) * (len(shape) - keep.ndim) + keep.shape)
        if not keep.any() and 0 not in shape:
            fully_masked.append(position)
        rest = [tuple(i for i in range(len(shape)) if i != axis) for axis in range(len(shape))]
        found.append(
            [np.broadcast_to(~keep.any(axis=r), (n,)) for r, n in zip(rest, shape, strict=True)]
        )
    return found, fully_masked


def removal_of(
    solution: Solution, own: list[AxisInfo], masked: Flags, fully_masked: list[int]
) -> Removal:
    """The units that go: those of which no slice of a parameter is left.

    Args:
      solution: of the constraints.
      own: axes of each parameter leaf.
      masked: which slices are masked throughout.
      fully_masked: which leaves are.
    """
    kept, seen = np.zeros(len(solution.reason), bool), np.zeros(len(solution.reason), bool)
    for axes, flags in zip(own, masked, strict=True):
        for ids, flag in zip(axes.ids, flags, strict=True):
            where, unit = solution.factors(solution.label[ids])
            seen[unit] = True
            kept[unit[~flag[where]]] = True
    removed = seen & ~kept & (solution.reason < 0)
    return Removal(removed, solution.removed(removed), tuple(fully_masked))
