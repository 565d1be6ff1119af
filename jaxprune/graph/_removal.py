"""What masks remove: units no slice of which is left, and leaves of which nothing is."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph._axes import Axes
from jaxprune.graph._units import Units


class Removal(NamedTuple):
    """What goes.

    Attributes:
      units: per component whether that unit goes.
      ids: per id whether it goes.
      blank: positions of leaves that are masked throughout.
    """

    units: np.ndarray
    ids: np.ndarray
    blank: tuple[int, ...]


Flags = list[list[np.ndarray]]  # per leaf and axis one bool per slice


def dead_slices(shapes: tuple[tuple[int, ...], ...], masks: list[Any]) -> tuple[Flags, list[int]]:
    """Which slices are masked throughout, and which whole leaves.

    Args:
      shapes: shape of each leaf.
      masks: one per leaf, broadcastable to it.
    """
    found, blank = [], []
    for position, (shape, mask) in enumerate(zip(shapes, masks, strict=True)):
        keep = np.asarray(mask)
        keep = keep.reshape((1,) * (len(shape) - keep.ndim) + keep.shape)
        if not keep.any() and 0 not in shape:
            blank.append(position)
        rest = [tuple(i for i in range(len(shape)) if i != axis) for axis in range(len(shape))]
        found.append(
            [np.broadcast_to(~keep.any(axis=r), (n,)) for r, n in zip(rest, shape, strict=True)]
        )
    return found, blank


def removal_of(units: Units, own: list[Axes], dead: Flags, blank: list[int]) -> Removal:
    """The units that go: those of which no slice of a parameter is left.

    Args:
      units: the solved facts.
      own: axes of each parameter leaf.
      dead: which slices are masked throughout.
      blank: which leaves are.
    """
    held, seen = np.zeros(len(units.why), bool), np.zeros(len(units.why), bool)
    for axes, flags in zip(own, dead, strict=True):
        for ids, flag in zip(axes.ids, flags, strict=True):
            where, unit = units.factors(units.label[ids])
            seen[unit] = True
            held[unit[~flag[where]]] = True
    gone = seen & ~held & (units.why < 0)
    return Removal(gone, units.removed(gone), tuple(blank))
