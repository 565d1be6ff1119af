"""Ids of axis indices, what is said of them, and what follows.

Every index of every axis carries an integer id. Rules state three kinds of facts: two ids are equal; an
id is frozen, for a reason; an id is the *product* of two others, its row and its column, after a reshape
split an axis in two or merged two into one: it goes when its row goes or its column goes. Facts are
collected as arrays and solved once, by connected components; what is left are the units.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

FROZEN = 0  # the id of all indices that never shrink


class Facts:
    """Facts about ids, as they are found."""

    def __init__(self) -> None:
        self.size = 1
        self.equal: list[tuple[np.ndarray, np.ndarray]] = []
        self.products: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, int]] = []
        self.bodies: dict[tuple[int, ...], Any] = {}  # programs within operations, by place
        self.turns: list[np.ndarray] = []  # ids of scanned axes: a unit there is a whole layer
        self.place: tuple[
            int, ...
        ] = ()  # value numbers of the operation at hand and of those around it
        self.reasons: list[str] = ["tied to an axis of an input, or of an operation without a rule"]

    def fresh(self, n: int) -> np.ndarray:
        """`n` new ids."""
        self.size += n
        return np.arange(self.size - n, self.size)

    def equate(self, a: np.ndarray, b: np.ndarray) -> None:
        """Index by index, `a` and `b` shrink together."""
        if a is not b:
            self.equal.append((a, b))

    def product(self, ids: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        """`ids[i]` goes when `rows[i]` or `columns[i]` goes, and only then."""
        self.products.append((ids, rows, columns))

    def freeze(self, ids: np.ndarray, reason: str) -> None:
        """These ids never shrink."""
        if ids.any():
            self.reasons.append(reason)
            self.frozen.append((ids, len(self.reasons) - 1))

    def solve(self) -> "Units":
        """The units that follow from all facts."""
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
        why = self._why(label, ids, rows, columns)
        row, column = np.full(label.max() + 1, -1), np.full(label.max() + 1, -1)
        row[label[ids]], column[label[ids]] = label[rows], label[columns]
        return Units(label, row, column, why, tuple(self.reasons))

    def _why(
        self, label: np.ndarray, ids: np.ndarray, rows: np.ndarray, columns: np.ndarray
    ) -> np.ndarray:
        """Per component the number of a reason that freezes it, or -1."""
        why = np.full(label.max() + 1, -1)
        why[label[FROZEN]] = 0
        for frozen, reason in self.frozen:
            parts = label[np.ravel(frozen)]
            why[parts[why[parts] < 0]] = reason
        while True:  # a product that is frozen freezes its row and its column
            before = why.copy()
            for side in (rows, columns):
                hit = (why[label[ids]] >= 0) & (why[label[side]] < 0)
                why[label[side[hit]]] = why[label[ids[hit]]]
            both = (why[label[rows]] >= 0) & (why[label[columns]] >= 0) & (why[label[ids]] < 0)
            why[label[ids[both]]] = why[label[rows[both]]]
            if (why == before).all():
                return why


@dataclass(frozen=True)
class Units:
    """Solved facts. A component of ids is a unit, unless it is a product of others.

    Attributes:
      label: component of each id.
      row: component of the row of each component that is a product, else -1.
      column: likewise.
      why: number of the reason that freezes each component, or -1.
      reasons: texts.
    """

    label: np.ndarray
    row: np.ndarray
    column: np.ndarray
    why: np.ndarray
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

    def removed(self, gone: np.ndarray) -> np.ndarray:
        """Per id whether it goes, given per component whether that unit goes."""
        gone = gone.copy()
        products = np.flatnonzero(self.row >= 0)
        while True:
            before = gone[products]
            gone[products] = gone[self.row[products]] | gone[self.column[products]]
            if (gone[products] == before).all():
                return gone[self.label]
