"""Parameters under other forms: which axes of a leaf make up the axes of a value computed from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxprune.program._primitives import Kind, primitive

NO_AXES: frozenset[int] = frozenset()


class Factor(NamedTuple):
    """A part of an axis of a value that is (part of) an axis of a leaf, counted from the end."""

    axis: int
    size: int


@dataclass(frozen=True)
class View:
    """A leaf as a value shows it.

    Attributes:
      leaf: its number.
      axes: per axis of the value the factors that it is made of, outer ones first.
      stacked: axes of the leaf of which one entry was taken.
      summed: axes of the leaf that a product with another parameter summed over.
      picked: axes of the value that a look-up made.
      from_look_up: the look-up that made the value.
    """

    leaf: int
    axes: tuple[tuple[Factor, ...], ...]
    stacked: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()
    picked: frozenset[int] = frozenset()
    from_look_up: Any = None

    @classmethod
    def of(cls, leaf: int, shape: tuple[int, ...]) -> "View":
        n = len(shape)
        return cls(leaf, tuple((Factor(i - n, k),) if k > 1 else () for i, k in enumerate(shape)))

    def at(self, axes: Iterable[int]) -> frozenset[int]:
        """The leaf's axes that lie in some axes of the value."""
        return frozenset(factor.axis for i in axes for factor in self.axes[i])

    def dropping(self, axes: Iterable[int]) -> "View":
        """Without some axes, of which one entry is left."""
        gone = set(axes)
        kept = tuple(x for i, x in enumerate(self.axes) if i not in gone)
        return replace(self, axes=kept, stacked=self.stacked | self.at(gone))


@dataclass(frozen=True)
class Value:
    """Which leaves a value shows, and whether data is in it too."""

    views: tuple[View, ...] = ()
    is_data: bool = False

    @property
    def is_parameter(self) -> bool:
        """Whether it is made of parameters alone."""
        return bool(self.views) and not self.is_data

    def mapped(self, f: Callable[[View], View]) -> "Value":
        return replace(self, views=tuple(dict.fromkeys(f(view) for view in self.views)))


DATA, CONSTANT = Value(is_data=True), Value()


def mixed(ins: Iterable[Value]) -> Value:
    """A value computed from others: a constant, data, or parameters side by side."""
    ins = list(ins)
    if any(x.is_data for x in ins):
        return DATA
    views = {len(v.axes): v for x in ins for v in x.views}
    same = len(views) <= 1
    return Value(tuple(dict.fromkeys(v for x in ins for v in x.views)) if same else ())


def covers(view: View, shape: tuple[int, ...]) -> bool:
    """Whether a view has entries of its own along every axis."""
    return all(axis or n == 1 for axis, n in zip(view.axes, shape, strict=True))


def with_axis(view: View) -> View:
    return replace(view, axes=((), *view.axes))


def resized(view: View, shape: tuple[int, ...]) -> View:
    """A view whose axes have other sizes: its part on one device."""
    axes = tuple(
        (axis[0]._replace(size=n),) if len(axis) == 1 else axis
        for axis, n in zip(view.axes, shape, strict=True)
    )
    return replace(view, axes=axes)


def sliced(view: View, one: Sequence[int], out: tuple[int, ...]) -> View:
    """One entry along some axes, whose place stays with size 1; shorter others keep their factors."""
    axes = tuple(() if i in one else x for i, x in enumerate(view.axes))
    return replace(_fitted(view, axes, out), stacked=view.stacked | view.at(one))


def _fitted(view: View, axes: Sequence[tuple[Factor, ...]], out: tuple[int, ...]) -> View:
    """Axes of other sizes than their factors, as slices and joins leave them."""

    def fitted(axis: tuple[Factor, ...], n: int) -> tuple[Factor, ...]:
        if not axis or int(np.prod([factor.size for factor in axis])) == n:
            return axis
        return (axis[0]._replace(size=n),)

    return replace(view, axes=tuple(fitted(axis, n) for axis, n in zip(axes, out, strict=True)))


def multiplied(
    views: Iterable[View], contracted: Sequence[int], batch: Sequence[int], out: Sequence[int]
) -> list[View]:
    """One operand's views in its product with other parameters.

    Args:
      views: of the operand.
      contracted, batch: its axes in the product.
      out: for each axis of the result the operand's axis, or -1.
    """
    return [
        replace(
            v,
            axes=tuple(v.axes[i] if i >= 0 else () for i in out),
            summed=v.summed | v.at(contracted),
            stacked=v.stacked | v.at(batch),
        )
        for v in views
    ]


def without_groups(view: View, axis: int, groups: int) -> tuple[View, frozenset[int]]:
    """A kernel's output axis without the leading factors that count groups: mapped-over layers."""
    factors, size = list(view.axes[axis]), 1
    while len(factors) > 1 and groups > 1 and size * factors[0].size <= groups:
        size *= factors[0].size
        taken = factors.pop(0)
        if size == groups:
            left = tuple(factors if i == axis else x for i, x in enumerate(view.axes))
            return replace(view, axes=left), frozenset([taken.axis])
    return view, frozenset()


def moved(
    name: str,
    params: dict[str, Any],
    ins: list[Value],
    shapes: list[tuple[int, ...]],
    outs: list[tuple[int, ...]],
) -> list[Value] | None:
    """What operations that move entries make of views; `None` for what mixes them."""
    if any(x.is_data for x in ins):
        return None
    value, shape, out = ins[0], shapes[0], outs[0] if outs else ()
    if name == "transpose":
        order = params["permutation"]
        return [
            value.mapped(lambda v: replace(v, axes=tuple(v.axes[i] for i in order), picked=NO_AXES))
        ]
    if name in ("reshape", "expand_dims"):
        order = params.get("dimensions") or range(len(shape))
        order = range(len(shape)) if name == "expand_dims" else order
        return [
            value.mapped(lambda v: replace(v, axes=_regrouped([v.axes[i] for i in order], out)))
        ]
    if name == "squeeze":
        return [value.mapped(lambda v: v.dropping(params["dimensions"]))]
    if name == "broadcast_in_dim":
        place = {to: i for i, to in enumerate(params["broadcast_dimensions"])}
        kept = lambda v, i: v.axes[place[i]] if i in place and shape[place[i]] == out[i] else ()
        return [value.mapped(lambda v: replace(v, axes=tuple(kept(v, i) for i in range(len(out)))))]
    if name == "slice":
        one = [i for i, (n, k) in enumerate(zip(out, shape, strict=True)) if k > n == 1]
        return [value.mapped(lambda v: sliced(v, one, out))]
    if name == "split":
        return [value.mapped(lambda v, o=o: _fitted(v, v.axes, o)) for o in outs]
    if name == "unstack":
        return [value.mapped(lambda v: v.dropping([params["axis"]]))] * len(outs)
    if name == "stack":
        at = params["axis"]
        put = lambda v: replace(v, axes=(*v.axes[:at], (), *v.axes[at:]))
        return [mixed([x.mapped(put) for x in ins])]
    if name == "tile":
        return [value.mapped(lambda v: _fitted(v, v.axes, out))] if len(shape) == len(out) else None
    if primitive(name).kind is Kind.JOIN or name == "rev":
        return [mixed([x.mapped(lambda v: _fitted(v, v.axes, out)) for x in ins if x.views])]
    if primitive(name).kind is Kind.REDUCTION and name.startswith("reduce_"):
        gone = set(params["axes"])
        cut = lambda v: replace(v, axes=tuple(x for i, x in enumerate(v.axes) if i not in gone))
        return [value.mapped(cut)] * len(outs)
    return None


def _regrouped(
    axes: Sequence[tuple[Factor, ...]], shape: tuple[int, ...]
) -> tuple[tuple[Factor, ...], ...]:
    """Factors after a reshape, split and merged as axes are; unknown where they do not fit."""
    left = [factor for axis in axes for factor in axis]
    known = int(np.prod([factor.size for factor in left]))
    if known != int(np.prod(shape)):  # an axis that is no leaf's lies between: only whole axes pass
        return _whole_axes(axes, shape)
    found = []
    for n in shape:
        mine: list[Factor] = []
        while n > 1 and left:
            factor = left.pop(0)
            part = int(np.gcd(factor.size, n))
            if part < factor.size:
                left.insert(0, factor._replace(size=factor.size // part))
            if part == 1:
                return tuple(() for _ in shape)
            mine.append(factor._replace(size=part))
            n //= part
        found.append(tuple(mine))
    return tuple(found)


def _whole_axes(
    axes: Sequence[tuple[Factor, ...]], shape: tuple[int, ...]
) -> tuple[tuple[Factor, ...], ...]:
    """Axes at both ends that a reshape leaves as they are; those between are known no more."""
    size = lambda axis: int(np.prod([factor.size for factor in axis]))
    held = [axis for axis in axes if axis]
    front, back = [], []
    rest = list(shape)
    while held and rest and (size(held[0]) == rest[0] or rest[0] == 1):
        front.append(held.pop(0) if size(held[0]) == rest[0] else ())
        rest.pop(0)
    while held and rest and (size(held[-1]) == rest[-1] or rest[-1] == 1):
        back.insert(0, held.pop() if size(held[-1]) == rest[-1] else ())
        rest.pop()
    return (*front, *(() for _ in rest), *back)
