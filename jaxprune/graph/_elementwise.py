"""Rules of elementwise operations: operands of one shape, index by index."""

from typing import Any

import numpy as np

from jaxprune.graph._axes import AxisInfo, Rule, plainest
from jaxprune.graph._constraints import Constraints
from jaxprune.graph._routing import is_share, low_of, passed_names, routed_zeros, value_of
from jaxprune.program import Kind, primitive


def elementwise(name: str) -> Rule:
    """Operands of one shape, scalars or axes of one entry that stretch: indices are equal."""

    def rule(
        constraints: Constraints,
        params: Any,
        source: str,
        ins: list[AxisInfo],
        outs: list[tuple[int, ...]],
    ) -> list[AxisInfo]:
        if len(outs) > 1:  # several values side by side, each passed on
            return [AxisInfo(x.ids, x.zero, x.value) for x in ins]
        shape = outs[0]
        chooses_first = name == "select_n" and ins[0].is_zero
        deciding = ins[1:2] if chooses_first else ins  # whose values the result has
        kind = "copy" if chooses_first else name
        ids, zero, uniform, lows = [], [], [], []
        for axis, n in enumerate(shape):
            carrying = [x for x in ins if len(x.shape) == len(shape) and x.shape[axis] == n]
            chosen = plainest(x.ids[axis] for x in carrying)
            for x in carrying:
                constraints.equate(chosen, x.ids[axis])
            ids.append(chosen)
            flags = [
                np.full(n, x.is_zero) | (x.zero[axis] if any(x is c for c in carrying) else False)
                for x in deciding
            ]
            low = [x.is_low(axis) if x.shape[axis : axis + 1] == (n,) else None for x in deciding]
            routed = routed_zeros(kind, n, low, constraints, axis, ids[-1], deciding)
            zero.append(_zero_of(kind, params, flags, [x.value for x in deciding]))
            zero[-1] = (zero[-1] | routed.zero) & ~routed.spoilt
            lows.append(low_of(kind, n, low, flags, deciding))
            uniform.append(_uniform(name, zero[-1], [x.alike(axis) for x in carrying]))
        known = _passed_on(kind, params, deciding[0].value)
        whole = [np.array([x.is_zero]) for x in deciding]
        if known is None and _zero_of(kind, params, whole, [x.value for x in deciding])[0]:
            known = 0.0
        if known is None:
            known = value_of(kind, params, deciding)
        names, counts = passed_names(kind, params, deciding)
        low = tuple(lows) if any(flags.any() for flags in lows) else None
        share = is_share(kind, deciding)
        return [AxisInfo(tuple(ids), tuple(zero), known, tuple(uniform), low, share, names, counts)]

    return rule


def _uniform(name: str, zero: np.ndarray, alike: list[np.ndarray]) -> np.ndarray:
    """Where results are the same along an axis, since all operands are."""
    if primitive(name).kind is Kind.COLLECTIVE:
        return zero
    both = np.logical_and.reduce(alike)
    return both if (zero <= both).all() else zero


def _passed_on(name: str, params: dict[str, Any], value: float | None) -> float | None:
    """A known number as an identity or a cast hands it on."""
    kind = primitive(name).kind
    if value is None or kind not in (Kind.IDENTITY, Kind.CAST):
        return None
    return float(np.asarray(value).astype(params.get("new_dtype", np.float64)))


def _zero_of(
    name: str, params: dict[str, Any], flags: list[np.ndarray], values: list[float | None]
) -> np.ndarray:
    """Where the result is zero, given where the operands are, and which operands are known numbers."""
    known = [v for v in values if v is not None]
    if name in ("max", "min") and len(known) == 1:
        sign = -1 if name == "max" else 1  # max(0, c) is 0 for c <= 0
        free = flags[values.index(None)]
        return free if sign * known[0] >= 0 else np.zeros_like(free)
    if name == "clamp" and values[0] is not None and values[2] is not None:
        return flags[1] if values[0] <= 0 <= values[2] else np.zeros_like(flags[1])
    if name == "pow":
        return flags[0] if values[1] is not None and values[1] > 0 else np.zeros_like(flags[0])
    if name == "select_n":
        return np.logical_and.reduce(flags[1:])
    if name == "ne":  # of what is zero from zero
        return np.logical_and.reduce(flags)
    if name == "integer_pow" and params.get("y", 1) <= 0:
        return np.zeros_like(flags[0])
    if primitive(name).absorbs_zero:
        return np.logical_or.reduce(flags)
    if primitive(name).preserves_zero:
        return np.logical_and.reduce(flags)
    if name == "div":  # 0 / 0 is no zero
        return flags[0] & ~flags[1]
    return np.zeros_like(flags[0])
