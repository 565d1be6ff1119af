"""Rules of elementwise operations: operands of one shape, index by index."""

from typing import Any

import numpy as np

from jaxprune.graph._axes import Axes, Rule, plainest
from jaxprune.graph._units import Facts

ZERO_PRESERVING = frozenset(
    [
        "abs",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cbrt",
        "ceil",
        "conj",
        "convert_element_type",
        "copy",
        "copy_p",
        "erf",
        "erf_inv",
        "expm1",
        "floor",
        "imag",
        "integer_pow",
        "log1p",
        "neg",
        "real",
        "reduce_precision",
        "round",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "tan",
        "tanh",
        "optimization_barrier",
        "name",
        "device_put",
        "sharding_constraint",
        "layout_constraint",
        "mesh_cast",
        "reshard",
        "pvary",
        "psum",
        "psum_invariant",
        "pmax",
        "pmin",
        "ppermute",
        "pcast",
    ]
)
UNARY = ZERO_PRESERVING | frozenset(
    [
        "acos",
        "acosh",
        "bessel_i0e",
        "bessel_i1e",
        "cos",
        "cosh",
        "digamma",
        "erfc",
        "exp",
        "exp2",
        "is_finite",
        "lgamma",
        "log",
        "logistic",
        "not",
        "population_count",
        "rsqrt",
        "one_minus_square",
        "bessel_i1e",
        "clz",
    ]
)
ALL_ZERO = frozenset(
    ["add", "add_any", "sub", "max", "min", "or", "xor", "nextafter", "select_n", "clamp"]
)
ANY_ZERO = frozenset(["mul", "and"])
BINARY = (
    ALL_ZERO
    | ANY_ZERO
    | frozenset(
        [
            "div",
            "rem",
            "pow",
            "atan2",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "shift_left",
            "shift_right_logical",
            "shift_right_arithmetic",
            "complex",
            "polygamma",
            "zeta",
            "igamma",
            "igammac",
            "igamma_grad_a",
            "random_gamma_grad",
            "regularized_incomplete_beta",
            "eq_to",
            "le_to",
            "lt_to",
        ]
    )
)


def elementwise(name: str) -> Rule:
    """Operands of one shape, scalars or axes of one entry that stretch: indices are equal."""

    def rule(
        facts: Facts, params: Any, source: str, ins: list[Axes], outs: list[tuple[int, ...]]
    ) -> list[Axes]:
        if len(outs) > 1:  # several values side by side, each passed on
            return [Axes(x.ids, x.zero, x.value) for x in ins]
        shape = outs[0]
        ids, zero = [], []
        for axis, n in enumerate(shape):
            carrying = [x for x in ins if len(x.shape) == len(shape) and x.shape[axis] == n]
            chosen = plainest(x.ids[axis] for x in carrying)
            for x in carrying:
                facts.equate(chosen, x.ids[axis])
            ids.append(chosen)
            flags = [
                np.full(n, x.is_zero) | (x.zero[axis] if any(x is c for c in carrying) else False)
                for x in ins
            ]
            zero.append(_zero_of(name, params, flags, [x.value for x in ins]))
        known = ins[0].value if name in _SAME_VALUE else None
        whole = [np.array([x.is_zero]) for x in ins]
        if known is None and _zero_of(name, params, whole, [x.value for x in ins])[0]:
            known = 0.0
        return [Axes(tuple(ids), tuple(zero), known)]

    return rule


_SAME_VALUE = ("convert_element_type", "copy", "stop_gradient", "name", "sharding_constraint")


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
    if name == "integer_pow" and params.get("y", 1) <= 0:
        return np.zeros_like(flags[0])
    if name in ZERO_PRESERVING:
        return flags[0]
    if name in ALL_ZERO:
        return np.logical_and.reduce(flags)
    if name in ANY_ZERO:
        return np.logical_or.reduce(flags)
    if name == "div":  # 0 / 0 is no zero
        return flags[0] & ~flags[1]
    return np.zeros_like(flags[0])
