"""Sharing a total among leaves: wishes in, densities within bounds out, the total met exactly.

A wish says how the density of each leaf grows with one number `c` (proportional to it, shifted by it,
what lies above a threshold). The `c` for which the clipped densities have the total is found by bisection
(water-filling), so whatever bounds take from some leaves the others share by the same rule.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Where
from jaxprune._uses import Uses

Bound = float | Mapping[str, float]
_LEAST = 1e-12  # of the largest wish: who wishes nothing takes what others cannot


class Share(NamedTuple):
    """The leaves that share a budget.

    Attributes:
      paths: of each.
      leaves: arrays, or structs of them.
      uses: of each; by convention where no program was read.
      sizes: (leaves,) entries.
      low, high: (leaves,) bounds of the density.
      sparsity: fraction to remove of all together.
      positions: among all leaves, in flatten order.
      count: of all leaves.
      treedef: of the tree.
    """

    paths: list[str]
    leaves: list[Any]
    uses: list[Uses]
    sizes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sparsity: float
    positions: list[int]
    count: int
    treedef: Any

    def scaled(self, wish: Any, costs: Any = None) -> PyTree:
        """Densities `c * wish`; of equal cost per entry, or of `costs` of whole leaves."""
        wish = np.asarray(wish, float)
        wish = np.maximum(wish, _LEAST * np.max(wish, initial=_LEAST))
        most = np.max(self.high / wish, initial=0.0)
        return self.filled(lambda c: c * wish, (0.0, float(most)), costs)

    def shifted(self, wish: Any) -> PyTree:
        """Densities `c + wish`."""
        wish = np.asarray(wish, float)
        ends = -np.max(wish, initial=0.0), 1.0 - np.min(wish, initial=0.0)
        return self.filled(lambda c: c + wish, ends)

    def filled(
        self,
        wish: Callable[[float], np.ndarray],
        ends: tuple[float, float],
        costs: Any = None,
    ) -> PyTree:
        """Tree of fractions to remove, with densities `wish(c)` within the bounds.

        Args:
          wish: (leaves,) densities, none of which falls as `c` grows.
          ends: a `c` for which all are at their lower bound, and one for the upper.
          costs: (leaves,) what a dense leaf costs of the total; its entries by default.

        Raises:
          ValueError: a total that the bounds do not allow.
        """
        costs = self.sizes if costs is None else np.asarray(costs, float)
        total = (1.0 - self.sparsity) * costs.sum()
        self._check_reach(costs, total)
        within = lambda c: np.clip(wish(c), self.low, self.high)
        a, b = ends
        below, above = self.low, self.high
        while (c := (a + b) / 2) not in (a, b):
            found = within(c)
            if (found * costs).sum() < total:
                a, below = c, found
            else:
                b, above = c, found
        # a wish may jump between two neighbouring numbers (tied scores): in between lies the total
        gap = ((above - below) * costs).sum()
        part = (total - (below * costs).sum()) / gap if gap > 0 else 0.0
        return self.tree(below + np.clip(part, 0.0, 1.0) * (above - below))

    def tree(self, densities: np.ndarray) -> PyTree:
        """A tree of fractions to remove; 0 for leaves that are not pruned."""
        fractions = [0.0] * self.count
        for position, density in zip(self.positions, densities, strict=True):
            fractions[position] = float(np.clip(1.0 - density, 0.0, 1.0))
        return self.treedef.unflatten(fractions)

    def _check_reach(self, costs: np.ndarray, total: float) -> None:
        whole = costs.sum()
        slack = 1e-9 * whole
        least, most = (self.low * costs).sum(), (self.high * costs).sum()
        if not least - slack <= total <= most + slack:
            raise ValueError(
                f"sparsity: {self.sparsity:g} is out of reach: within max_sparsity=, min_keep= and "
                f"fixed= it is between {1 - most / whole:.4g} and {1 - least / whole:.4g}; loosen these"
            )


def share_of(
    params: Params,
    sparsity: float,
    *,
    uses: Any,
    where: Where,
    max_sparsity: Bound,
    min_keep: int,
    fixed: Mapping[str, float] | None,
) -> Share:
    """The leaves that share a budget, and their bounds; checks all arguments.

    Args:
      params: any tree of arrays or structs.
      sparsity: fraction to remove of all together.
      uses, where: which leaves.
      max_sparsity: the most that a leaf may lose, or that by regular expressions of paths.
      min_keep: entries that each leaf keeps at least; each layer of a leaf that `uses` says is stacked.
      fixed: fractions to remove, by regular expressions of paths.
    """
    _checks.fraction("sparsity", sparsity)
    if _checks.is_traced(sparsity):
        raise TypeError(
            "sparsity: expected a number, got a traced value; budgets are made outside jit, "
            "or give the traced sparsity to jp.masks.from_scores"
        )
    _checks.positive_int("min_keep", min_keep, least=0)
    paths, leaves, treedef = _trees.flatten(params)
    known = _trees.uses_of(params, uses)
    hits = _trees.select(params, where, uses=uses)
    positions = [i for i, hit in enumerate(hits) if hit and np.prod(np.shape(leaves[i]))]
    pick = lambda items: [items[i] for i in positions]
    own = pick(paths)
    sizes = np.array([np.prod(leaf.shape) for leaf in pick(leaves)], float)
    layers = [1.0 if uses is None else _layers(known[i], leaves[i].shape) for i in positions]
    few = np.minimum(min_keep * np.array(layers, float) / np.maximum(sizes, 1.0), 1.0)
    low = np.maximum(1.0 - _bounds("max_sparsity", max_sparsity, own, 1.0), few)
    high = np.ones(len(own))
    for at, removed in _matches("fixed", fixed or {}, own):
        low[at] = high[at] = 1.0 - removed
    return Share(
        own,
        pick(leaves),
        pick(known),
        sizes,
        low,
        high,
        float(sparsity),
        positions,
        len(leaves),
        treedef,
    )


def _layers(use: Uses, shape: tuple[int, ...]) -> float:
    return float(np.prod([shape[axis] for axis in use.stacked]))


def _bounds(name: str, value: Bound, paths: list[str], default: float) -> np.ndarray:
    if not isinstance(value, Mapping):
        _checks.fraction(name, value)
        return np.full(len(paths), float(value))
    found = np.full(len(paths), default)
    for at, bound in _matches(name, value, paths):
        found[at] = bound
    return found


def _matches(name: str, table: Mapping[str, float], paths: list[str]) -> list[tuple[int, float]]:
    """Positions of the paths that each regular expression matches, and its fraction.

    Raises:
      ValueError: one that matches nothing, or a fraction outside [0, 1]; two that match one path.
    """
    found: dict[int, float] = {}
    for pattern, value in table.items():
        _checks.fraction(f"{name}[{pattern!r}]", value)
        regex = _trees.compile_pattern(pattern, parameter=name)
        hits = [i for i, path in enumerate(paths) if regex.fullmatch(path)]
        if not hits:
            raise ValueError(_trees.no_match(pattern, paths, parameter=name))
        for i in hits:
            if found.get(i, value) != value:
                raise ValueError(
                    f"{name}: {paths[i]!r} is matched by two patterns, with {found[i]:g} and {value:g}"
                )
            found[i] = float(value)
    return list(found.items())
