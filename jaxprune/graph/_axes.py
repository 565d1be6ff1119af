"""What is known of a value while a program is walked."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxprune.graph._constraints import FROZEN, Constraints, may_shrink


@dataclass(frozen=True)
class AxisInfo:
    """What is known of a value, axis by axis.

    Attributes:
      ids: per axis one id per index.
      zero: per axis one bool per index: zero once its unit is masked.
      value: the number that all entries have, where it is known.
      uniform: per axis one bool per index: once their units are masked, all these hold the same along
        the axis, zero or not. `None` where nothing but `zero` is known.
      low: per axis one bool per index: minus infinity once its unit is masked, see `_routing`. `None`:
        nowhere.
      is_share: no entry is below 0, as of exponentials and their shares, so that a zero is the least.
      names: ids of an axis of which all entries are indices, none of a masked unit; or `None`.
      counts: the axis along which the entries are 0, 1, 2, …; or `None`.
    """

    ids: tuple[np.ndarray, ...]
    zero: tuple[np.ndarray, ...]
    value: float | None = None
    uniform: tuple[np.ndarray, ...] | None = None
    low: tuple[np.ndarray, ...] | None = None
    is_share: bool = False
    names: np.ndarray | None = None
    counts: int | None = None

    def alike(self, axis: int) -> np.ndarray:
        """Which indices of an axis hold the same along it, once their units are masked."""
        if self.value is not None:
            return np.ones(len(self.ids[axis]), bool)
        return self.zero[axis] if self.uniform is None else self.uniform[axis]

    def is_low(self, axis: int) -> np.ndarray:
        """Which indices of an axis hold minus infinity, once their units are masked."""
        if self.value == -np.inf:
            return np.ones(len(self.ids[axis]), bool)
        return np.zeros(len(self.ids[axis]), bool) if self.low is None else self.low[axis]

    def is_least(self, axis: int) -> np.ndarray:
        """Which indices of an axis are never above others, once their units are masked."""
        return self.is_low(axis) | (self.zero[axis] & self.is_share)

    def moved(self, to: dict[int, int], shape: tuple[int, ...]) -> dict[str, Any]:
        """`low`, `is_share`, `names` and `counts` under other axes; `to`: where those are
        that stay whole.
        """
        low = None
        if self.low is not None:
            back = {new: old for old, new in to.items()}
            flags = (
                self.low[back[i]] if i in back else np.zeros(n, bool) for i, n in enumerate(shape)
            )
            low = tuple(flags)
        counts = None if self.counts is None else to.get(self.counts)
        return {"low": low, "is_share": self.is_share, "names": self.names, "counts": counts}

    @property
    def is_zero(self) -> bool:
        """The whole value is zero always."""
        return self.value == 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(len(x) for x in self.ids)


def input_axes(constraints: Constraints, shape: tuple[int, ...], name: str) -> AxisInfo:
    """An input, of which nothing shrinks."""
    ids = [
        constraints.fixed(n, f"tied to axis {axis} of input {name}") for axis, n in enumerate(shape)
    ]
    return AxisInfo(tuple(ids), tuple(np.zeros(n, bool) for n in shape))


def fixed_axes(constraints: Constraints, shape: tuple[int, ...], reason: str) -> AxisInfo:
    """A value of which nothing shrinks, for a reason."""
    ids = tuple(constraints.fixed(n, reason) for n in shape)
    return AxisInfo(ids, tuple(np.zeros(n, bool) for n in shape))


def fresh_axes(constraints: Constraints, shape: tuple[int, ...], *, zero: bool) -> AxisInfo:
    """A value whose indices are tied to nothing yet; axes of one entry never shrink."""
    ids = tuple(constraints.fresh(n) if n > 1 else np.full(n, FROZEN) for n in shape)
    return AxisInfo(ids, tuple(np.full(n, zero) for n in shape))


def no_rule(
    constraints: Constraints,
    params: Any,
    source: str,
    ins: list[AxisInfo],
    outs: list[tuple[int, ...]],
    name: str,
) -> list[AxisInfo]:
    """Freezes all that the operation touches."""
    reason = f"no rule for {name} at {source}"
    for value in ins:
        for ids in value.ids:
            constraints.freeze(ids, reason)
    return [fixed_axes(constraints, shape, reason) for shape in outs]


Rule = Callable[
    [Constraints, dict[str, Any], str, list[AxisInfo], list[tuple[int, ...]]], list[AxisInfo]
]
"""`(constraints, params, source, operands, shapes of the results) -> results`."""


def plainest(candidates: Iterable[np.ndarray]) -> np.ndarray:
    """The ids with the fewest different ones: repeated ids remember how an axis was merged."""
    different = list({id(ids): ids for ids in candidates}.values())
    return different[0] if len(different) == 1 else min(different, key=_variety)


def _variety(ids: np.ndarray) -> int:
    return len(np.unique(ids)) if may_shrink(ids) else -1


def joined(
    constraints: Constraints, ins: list[AxisInfo], axes: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids and zeros of some axes along which operands go side by side."""
    ids, zero = [], []
    for axis in axes:
        chosen = plainest(x.ids[axis] for x in ins)
        for x in ins:
            constraints.equate(chosen, x.ids[axis])
        ids.append(chosen)
        zero.append(np.logical_and.reduce([x.zero[axis] | x.is_zero for x in ins]))
    return ids, zero


def passed_or_frozen(
    constraints: Constraints, x: AxisInfo, shape: tuple[int, ...], passes: list[bool], reason: str
) -> AxisInfo:
    """A result of `shape` whose axes are those of `x` where they pass; the others freeze."""
    ids, zero = [], []
    for axis, n in enumerate(shape):
        if passes[axis]:
            ids.append(x.ids[axis])
            zero.append(x.zero[axis])
        else:
            constraints.freeze(x.ids[axis], reason)
            ids.append(constraints.fixed(n, reason))
            zero.append(np.zeros(n, bool))
    return AxisInfo(tuple(ids), tuple(zero))
