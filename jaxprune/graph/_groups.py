"""Units gathered into groups with names, and the reasons of those that cannot shrink."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._constraints import Solution

Member = tuple[str, int]


@dataclass(frozen=True, repr=False)
class Group:
    """Units that live on the same axes: the channels of some layers, the heads of an attention.

    Attributes:
      name: the member that makes them, as `path[axis]`.
      size: number of units.
      members: every `(path, axis)` that shrinks with them.
      units: numbers of the units.
      kind: what they are, read off the program: `"stream"` (features that residual branches are added
        to), `"heads"`, or of grouped queries `"kv heads"` and `"queries per kv head"`; `"head dim"`,
        `"neurons"`, `"channels"` (of convolutions), `"experts"`, `"states"` (what a recurrence carries),
        `"layers"` (iterations of a scan over stacked layers).
      label: the module that they live in and their kind, `layers/3/mlp/neurons`.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    units: np.ndarray
    kind: str = "neurons"
    label: str = ""

    def __repr__(self) -> str:
        return (
            f"Group({self.label or self.name!r}: {self.size} {self.kind}, {len(self.members)} axes)"
        )


def groups_of(
    paths: tuple[str, ...], own: list[AxisInfo], solution: Solution, iterations: frozenset[int]
) -> tuple[Group, ...]:
    """The units that can shrink, gathered by the axes that they live on.

    Args:
      paths: path of each parameter.
      own: its axes.
      solution: of the constraints.
      iterations: units that are iterations of scans.
    """
    members: list[Member] = []
    pairs = [np.zeros((2, 0), np.int64)]
    for path, axes in zip(paths, own, strict=True):
        for axis, ids in enumerate(axes.ids):
            parts = np.unique(solution.label[ids])
            found = np.unique(solution.factors(parts[solution.reason[parts] < 0])[1])
            found = found[solution.reason[found] < 0]
            pairs.append(np.stack([found, np.full(len(found), len(members))]))
            members.append((path, axis))
    unit, member = np.concatenate(pairs, axis=1)
    # units with the same set of members have the same sum of random numbers
    marks = np.random.default_rng(0).integers(0, 2**63, (len(members), 2), np.uint64)
    sums = np.zeros((len(solution.reason), 2), np.uint64)
    np.add.at(sums, unit, marks[member])
    first = np.full(len(solution.reason), len(members))
    np.minimum.at(first, unit, member)
    seen = np.flatnonzero(first < len(members))
    seen = seen[np.argsort(first[seen], kind="stable")]
    _, representative, kind = np.unique(sums[seen], axis=0, return_index=True, return_inverse=True)
    kind = kind.reshape(-1)
    by_unit = np.argsort(unit, kind="stable")
    start = np.searchsorted(unit[by_unit], np.arange(len(solution.reason) + 1))
    # rows and columns of one product live on the same axes: heads and head dimensions
    column = np.zeros(len(solution.reason), bool)
    column[solution.column[solution.column >= 0]] = True
    rank = {path: len(axes.ids) for path, axes in zip(paths, own, strict=True)}
    groups = []
    for which in np.argsort(representative):
        mine = seen[kind == which]
        entry = tuple(members[i] for i in member[by_unit[start[mine[0]] : start[mine[0] + 1]]])
        for side in (False, True):
            part = mine[column[mine] == side]
            if len(part):
                layers = iterations.issuperset(part.tolist())
                what = "layers" if layers else "neurons"
                groups.append(Group(_name(entry, rank), len(part), entry, part, what))
    return _named_apart(groups, column)


def _named_apart(groups: list[Group], column: np.ndarray) -> tuple[Group, ...]:
    """Groups of one name told apart: heads are the outer part of an axis, their dimensions the inner."""
    count = Counter(group.name for group in groups)
    seen: Counter[str] = Counter()
    found = []
    for group in groups:
        name = group.name
        if count[name] > 1:
            name += " (inner)" if column[group.units[0]] else " (outer)"
        seen[name] += 1
        name += f" #{seen[name]}" if seen[name] > 1 else ""
        found.append(replace(group, name=name))
    return tuple(found)


def labelled(groups: Sequence[Group], kinds: Sequence[str], paths: Sequence[str]) -> list[Group]:
    """Groups with their kinds, and labels that no two share.

    A label begins with the module that all members lie in; where that is the whole tree, with the module
    that makes the units, unless they are the stream.
    """
    top = _shared(paths)
    modules = [_shared([path for path, _ in group.members]) for group in groups]
    makers = [group.name.rpartition("[")[0] for group in groups]
    makers = [maker.rpartition("/")[0] or maker for maker in makers]
    first = [
        maker if module == top and kind not in ("stream", "layers") else module
        for module, maker, kind in zip(modules, makers, kinds, strict=True)
    ]
    label = lambda module, kind: f"{module}/{kind}" if module else kind
    labels = list(map(label, first, kinds))
    count = Counter(labels)
    parts = [
        group.name[group.name.rindex("]") + 1 :] for group in groups
    ]  # " (outer)" and the like
    labels = [
        label(maker, kind) + part if count[old] > 1 else old
        for old, maker, kind, part in zip(labels, makers, kinds, parts, strict=True)
    ]
    seen: Counter[str] = Counter()
    found = []
    for group, kind, name in zip(groups, kinds, labels, strict=True):
        seen[name] += 1
        unique = f"{name} #{seen[name]}" if seen[name] > 1 else name
        found.append(replace(group, kind=kind, label=unique))
    return found


def _shared(paths: Sequence[str]) -> str:
    """The module that all leaves lie in."""
    modules = [path.split("/")[:-1] for path in paths]
    same = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    return "/".join(same)


def _name(members: tuple[Member, ...], rank: dict[str, int]) -> str:
    """A matrix that makes the units, if there is one, else any, else the first member."""
    matrices = [(path, axis) for path, axis in members if rank[path] > 1]
    makers = [(path, axis) for path, axis in matrices if axis == rank[path] - 1]
    path, axis = (makers or matrices or list(members))[0]
    return f"{path}[{axis}]"


def frozen_of(
    paths: tuple[str, ...], own: list[AxisInfo], solution: Solution
) -> tuple[tuple[Member, str], ...]:
    """The axes that cannot shrink, or not all of them, each with a reason."""
    found = []
    for path, axes in zip(paths, own, strict=True):
        for axis, ids in enumerate(axes.ids):
            reasons = solution.reason[solution.label[ids]]
            stuck = reasons[reasons >= 0]
            if not len(stuck):
                continue
            reason = solution.reasons[stuck[0]] if len(ids) > 1 else "it has one entry"
            if len(stuck) < len(ids):
                reason = f"{len(stuck)} of its {len(ids)} indices: {reason}"
            found.append(((path, axis), reason))
    return tuple(found)
