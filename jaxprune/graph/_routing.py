"""Logits of minus infinity: what is known of routers, whose masked experts get no tokens.

`structure.route_around` gives an expert whose router column is zero a logit of minus infinity. The axis
of experts may then shrink where a softmax, a maximum or a choice of the largest runs over it, which all
other masked indices forbid: minus infinity adds nothing to a maximum, its exponential nothing to a sum,
and neither is among the largest. Indices that were chosen so *name* entries of the axis, and never a
masked one.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._constraints import Constraints
from jaxprune.program import Kind, primitive

NO_EXPERT = "jaxprune: all experts are masked"
"""Marks, by `jax.ad_checkpoint.checkpoint_name`, a condition that is never true of what is compacted: a
router of which nothing is left is refused."""


class Routed(NamedTuple):
    """Of an elementwise operation, per index of an axis.

    Attributes:
      zero: zero since an operand is minus infinity, or an index that names no masked unit.
      spoilt: perhaps not a number, where zero meets minus infinity.
    """

    zero: np.ndarray
    spoilt: np.ndarray


def routed_zeros(
    name: str,
    n: int,
    low: list[np.ndarray | None],
    constraints: Constraints,
    axis: int,
    ids: np.ndarray,
    ins: list[AxisInfo],
) -> Routed:
    """What minus infinity and names say of an elementwise result along one axis."""
    nothing = np.zeros(n, bool)
    flags = [nothing if x is None else x for x in low]
    if primitive(name).is_exponential:
        return Routed(flags[0], nothing)
    if name == "eq":
        for x, other in (ins, ins[::-1]):
            if x.counts == axis and other.names is not None and len(other.names) == n:
                constraints.equate(ids, other.names)
                return Routed(~nothing, nothing)  # of a masked index: named by nothing
    if primitive(name).absorbs_zero or name == "div":
        return Routed(nothing, np.logical_or.reduce(flags))
    return Routed(nothing, nothing)


def low_of(
    name: str,
    n: int,
    low: list[np.ndarray | None],
    zero: list[np.ndarray],
    ins: list[AxisInfo],
) -> np.ndarray:
    """Where an elementwise result is minus infinity along one axis."""
    nothing = np.zeros(n, bool)
    flags = [nothing if x is None else x for x in low]
    known = [x.value for x in ins]
    kind = primitive(name).kind
    if kind in (Kind.IDENTITY, Kind.CAST):
        return flags[0]
    if name in ("add", "add_any"):
        return np.logical_or.reduce(flags)
    if name == "sub":
        return flags[0] & ~flags[1]
    if name in ("mul", "div"):  # by a number above 0
        positive = [v is not None and 0 < v < np.inf for v in known]
        if positive[1]:
            return flags[0]
        return flags[1] if positive[0] and name == "mul" else nothing
    if name == "select_n":
        cases = [np.full(n, x.value == -np.inf) | f for x, f in zip(ins, flags, strict=True)][1:]
        every = np.logical_and.reduce(cases)
        # where the condition is false once masked, the first case is taken
        return every | (zero[0] & cases[0])
    return nothing


def value_of(name: str, params: dict[str, Any], ins: list[AxisInfo]) -> float | None:
    """A number that marks and names give away."""
    if name == "name" and params.get("name") == NO_EXPERT:
        return 0.0
    if name == "lt" and ins[0].names is not None and ins[1].value is not None and ins[1].value <= 0:
        return 0.0  # what names an entry is at least 0
    return None


def is_share(name: str, ins: list[AxisInfo]) -> bool:
    """Whether no entry of an elementwise result is below 0; of exponentials and what is made of them."""
    if primitive(name).is_exponential:
        return True
    known = primitive(name)
    if known.kind in (Kind.IDENTITY, Kind.CAST) or name in ("mul", "div", "add", "add_any"):
        return all(x.is_share for x in ins)
    return False


def passed_names(
    name: str, params: dict[str, Any], ins: list[AxisInfo]
) -> tuple[np.ndarray | None, int | None]:
    """`names` and `counts` of an elementwise result."""
    first = ins[0]
    kind = primitive(name).kind
    if kind is Kind.IDENTITY or (kind is Kind.CAST and _holds_indices(params)):
        return first.names, first.counts
    carrying = [x for x in ins if x.names is not None]
    if len(carrying) != 1:
        return None, None
    names = carrying[0].names
    assert names is not None
    bounds = [x.value for x in ins if x is not carrying[0] and x.value is not None]
    last, wanted = len(names) - 1, {"clamp": 2, "max": 1, "min": 1}
    inside = len(bounds) == wanted.get(name, -1) and (name == "max" or bounds[-1] >= last)
    inside &= name == "min" or (inside and bounds[0] <= 0)
    return (names if inside else None), None


def _holds_indices(params: dict[str, Any]) -> bool:
    return np.dtype(params.get("new_dtype", np.bool_)) != np.bool_
