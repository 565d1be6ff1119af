"""The roles of a leaf's axes in one use of it, and in all of its uses together."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxprune._uses import KINDS, UseKind, Uses
from jaxprune.program._views import View


class Use(NamedTuple):
    """One use of one leaf: the roles of its axes."""

    leaf: int
    kind: UseKind
    stacked: frozenset[int]
    contracted: frozenset[int]
    free: frozenset[int]
    spatial: frozenset[int]
    source: str


def use_of(
    view: View,
    kind: UseKind,
    source: str,
    stacked: Iterable[int] = (),
    contracted: Iterable[int] = (),
    free: Iterable[int] = (),
    spatial: Iterable[int] = (),
) -> Use:
    """A use, given roles of the axes of a value."""
    stacks = view.stacked | view.at(stacked)
    sums, frees, window = (view.at(axes) for axes in (contracted, free, spatial))
    # the side of a product of parameters that data does not reach
    sums, frees = (sums, frees | view.summed) if sums else (sums | view.summed, frees)
    return Use(
        view.leaf, kind, stacks, sums - stacks, frees - sums - stacks, window - stacks, source
    )


_ROLES = ("stacked", "spatial", "contracted", "free")


def is_weight(use: Use) -> bool:
    return Uses(use.kind).is_weight


def joined(found: list[Use], shape: tuple[int, ...]) -> Uses:
    """Uses of one leaf as one: those of the most telling kind decide, the first before the others."""
    if not found:
        return Uses("unused", ndim=len(shape))
    kind = min((use.kind for use in found), key=KINDS.index)
    telling = [use for use in found if use.kind == kind]
    axes: dict[str, list[int]] = {role: [] for role in _ROLES}
    told = []
    for axis in range(-len(shape), 0):
        having: dict[str, str] = {}
        for use in telling:
            for role in _ROLES:
                if axis in getattr(use, role):
                    having.setdefault(role, use.source)
        if not having:
            continue
        # layers never share a scale; else the first use has the say
        axes["stacked" if "stacked" in having else next(iter(having))].append(axis)
        if len(having) > 1:
            told.append(
                f"axis {axis} is " + " and ".join(f"{r} at {at}" for r, at in having.items())
            )
    roles = {role: tuple(axes[role]) for role in _ROLES}
    return Uses(kind, **roles, contradiction="; ".join(told), ndim=len(shape))
