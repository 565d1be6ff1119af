"""Groups by kind, name and path: one way to choose them everywhere."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxprune import _trees
from jaxprune.graph._groups import Group
from jaxprune.graph._kinds import KINDS

Only = str | Sequence[str] | None
"""Kinds of groups; `None` for all."""
GroupWhere = str | Sequence[Any] | Callable[[Group], bool] | None
"""A kind, the name or label of a group, or a regular expression matched in full against names, labels and
paths of members; a sequence of those; or `f(group) -> bool`. `None` for all.
"""


def chosen_groups(
    groups: Sequence[Group], *, only: Only = None, where: GroupWhere = None
) -> list[Group]:
    """The groups that are of some kinds, and that `where` selects.

    Raises:
      ValueError: a kind that does not exist or that no group is of, or a pattern that matches nothing;
        the message lists what there is.
      TypeError: `where` is of another type.
    """
    found = list(groups)
    if only is not None:
        kinds = [only] if isinstance(only, str) else list(only)
        for kind in kinds:
            _check_kind(kind, groups)
        found = [group for group in found if group.kind in kinds]
    if where is not None:
        names = {group.name for group in _selected(groups, where)}
        both = [group for group in found if group.name in names]
        if found and not both:
            raise ValueError(
                f"only, where: no group is of kind {only!r} and matches {where!r}; {_listed(groups)}"
            )
        found = both
    return found


def _check_kind(kind: Any, groups: Sequence[Group]) -> None:
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"only: {kind!r} is no kind: expected some of {list(KINDS)}{hint}")
    if all(group.kind != kind for group in groups):
        raise ValueError(f"only: no group is of kind {kind!r}; {_listed(groups)}")


def _selected(groups: Sequence[Group], where: Any) -> list[Group]:
    if isinstance(where, str):
        regex = None
        if not any(where in (group.kind, group.name, group.label) for group in groups):
            regex = _trees.compile_pattern(where)
        hits = [group for group in groups if _hit(group, where, regex)]
        if not hits:
            if where in KINDS:
                raise ValueError(f"where: no group is of kind {where!r}; {_listed(groups)}")
            raise ValueError(
                f"where: {where!r} matches no group: no kind, and in full no name, label or path of a "
                f"member; {_listed(groups, where)}"
            )
        return hits
    if callable(where):
        hits = [group for group in groups if where(group)]
        if not hits:
            raise ValueError(f"where: the function selects no group; {_listed(groups)}")
        return hits
    if isinstance(where, Sequence):
        return [group for item in where for group in _selected(groups, item)]
    raise TypeError(
        "where: expected None, a kind, a regular expression, a sequence of those or a callable "
        f"(group) -> bool, got {type(where).__name__}"
    )


def _hit(group: Group, where: str, regex: Any) -> bool:
    if regex is None:
        return where in (group.kind, group.name, group.label)
    texts = [group.name, group.label, *(path for path, _ in group.members)]
    return any(regex.fullmatch(text) for text in texts)


def _listed(groups: Iterable[Group], near: str = "") -> str:
    """The kinds and some labels that there are."""
    groups = list(groups)
    kinds = [kind for kind in KINDS if any(group.kind == kind for group in groups)]
    labels = [group.label for group in groups]
    shown = dict.fromkeys([*difflib.get_close_matches(near, labels, n=3, cutoff=0.3), *labels])
    few = ", ".join(repr(label) for label in list(shown)[:6])
    more = f" and {len(labels) - 6} more" if len(labels) > 6 else ""
    return f"there are the kinds {kinds} and the groups {few}{more}" if groups else "there is none"
