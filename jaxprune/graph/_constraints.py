"""Ids of axis indices, what is said of them, and what follows.

Every index of every axis carries an integer id. Rules state three kinds of constraints: two ids are
equal; an id is frozen, for a reason; an id is the *product* of two others, its row and its column, after
a reshape split an axis in two or merged two into one: it goes when its row goes or its column goes.
Constraints are collected as arrays and solved once, by connected components; what is left are the units.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

FROZEN = 0  # the id of indices that never shrink
LAST_FIXED = 1 << 14  # ids up to here never shrink either, each for a reason of its own


def may_shrink(ids: np.ndarray) -> bool:
    """Whether some ids are not those of indices that never shrink from the start."""
    return bool((ids > LAST_FIXED).any())


class Constraints:
    """Constraints on ids, as they are found."""

    def __init__(self) -> None:
        self.size = 1 + LAST_FIXED
        self._fixed: dict[str, int] = {}
        self.equal: list[tuple[np.ndarray, np.ndarray]] = []
        self.products: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, int]] = []
        self.iterations: list[np.ndarray] = []  # ids of scanned axes: a unit there is a whole layer
        self.values: dict[
            int, Any
        ] = {}  # axes of each value, by number, those of inner programs too
        self.is_symbolic = False  # some sizes are symbolic, and numbers stand for them
        self.reasons: list[str] = ["tied to an axis that never shrinks"]

    def fresh(self, n: int) -> np.ndarray:
        """`n` new ids."""
        self.size += n
        return np.arange(self.size - n, self.size)

    def fixed(self, n: int, reason: str) -> np.ndarray:
        """The id of an axis that never shrinks, `n` times: what is tied to it stays for this reason."""
        if reason not in self._fixed and len(self._fixed) < LAST_FIXED:
            self._fixed[reason] = len(self._fixed) + 1
            self.reasons.append(reason)
            self.frozen.append((np.array([self._fixed[reason]]), len(self.reasons) - 1))
        return np.full(n, self._fixed.get(reason, FROZEN) if n > 1 else FROZEN)

    def equate(self, a: np.ndarray, b: np.ndarray) -> None:
        """Index by index, `a` and `b` shrink together."""
        if a is not b and (may_shrink(a) or may_shrink(b)):
            self.equal.append((a, b))

    def product(self, ids: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        """`ids[i]` goes when `rows[i]` or `columns[i]` goes, and only then."""
        self.products.append((ids, rows, columns))

    def freeze(self, ids: np.ndarray, reason: str) -> None:
        """These ids never shrink."""
        if may_shrink(ids):
            self.reasons.append(reason)
            self.frozen.append((ids, len(self.reasons) - 1))

    def solve(self) -> "Solution":
        """The units that follow from all constraints."""
        from scipy.sparse import coo_array  # slow to import: when a trace needs it
        from scipy.sparse.csgraph import connected_components

        equal = [np.concatenate([np.ravel(pair[i]) for pair in self.equal] or [[]]) for i in (0, 1)]
        a, b = (x.astype(np.int64) for x in equal)
        parts = [np.concatenate([np.ravel(p[i]) for p in self.products] or [[]]) for i in range(3)]
        ids, rows, columns = (x.astype(np.int64) for x in parts)
        while True:
            graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(self.size, self.size))
            label = connected_components(graph, directed=False)[1]
            # ids of one component have one row and one column
            order = np.argsort(label[ids], kind="stable")
            same = label[ids][order[1:]] == label[ids][order[:-1]]
            left, right = order[1:][same], order[:-1][same]
            more = [
                (side[left][d], side[right][d])
                for side in (rows, columns)
                for d in [label[side[left]] != label[side[right]]]
            ]
            if not sum(len(x) for x, _ in more):
                break
            a = np.concatenate([a, *(x for x, _ in more)])
            b = np.concatenate([b, *(y for _, y in more)])
        reason = self._reasons_of(label, ids, rows, columns)
        row, column = np.full(label.max() + 1, -1), np.full(label.max() + 1, -1)
        row[label[ids]], column[label[ids]] = label[rows], label[columns]
        return Solution(label, row, column, reason, tuple(self.reasons))

    def _reasons_of(
        self, label: np.ndarray, ids: np.ndarray, rows: np.ndarray, columns: np.ndarray
    ) -> np.ndarray:
        """Per component the number of a reason that freezes it, or -1."""
        found = np.full(label.max() + 1, -1)
        for frozen, reason in self.frozen:
            parts = label[np.ravel(frozen)]
            found[parts[found[parts] < 0]] = reason
        if found[label[FROZEN]] < 0:
            found[label[FROZEN]] = 0
        while True:  # a product that is frozen freezes its row and its column
            before = found.copy()
            for side in (rows, columns):
                hit = (found[label[ids]] >= 0) & (found[label[side]] < 0)
                found[label[side[hit]]] = found[label[ids[hit]]]
            both = (
                (found[label[rows]] >= 0) & (found[label[columns]] >= 0) & (found[label[ids]] < 0)
            )
            found[label[ids[both]]] = found[label[rows[both]]]
            if (found == before).all():
                return found


@dataclass(frozen=True)
class Solution:
    """What follows from constraints. A component of ids is a unit, unless it is a product of others.

    Attributes:
      label: component of each id.
      row: component of the row of each component that is a product, else -1.
      column: likewise.
      reason: number of the reason that freezes each component, or -1.
      reasons: texts.
    """

    label: np.ndarray
    row: np.ndarray
    column: np.ndarray
    reason: np.ndarray
    reasons: tuple[str, ...]

    def factors(self, components: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which units take which components along: positions in `components`, and units."""
        position, unit = np.arange(len(components)), components
        while (product := self.row[unit] >= 0).any():
            position = np.concatenate([position[~product], position[product], position[product]])
            unit = np.concatenate(
                [unit[~product], self.row[unit[product]], self.column[unit[product]]]
            )
        return position, unit

    def removed(self, units: np.ndarray) -> np.ndarray:
        """Per id whether it goes, given per component whether that unit goes."""
        found = units.copy()
        products = np.flatnonzero(self.row >= 0)
        while True:
            before = found[products]
            found[products] = found[self.row[products]] | found[self.column[products]]
            if (found[products] == before).all():
                return found[self.label]
