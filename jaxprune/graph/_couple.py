"""One rule per primitive: how the ids of its results follow from those of its operands.

A rule gets the operation's parameters and the `Axes` of its operands, states facts, and returns the
`Axes` of its results. `zero` says of each index that the value there is exactly zero once its unit is
masked: the condition under which a sum does not notice the unit's removal. A primitive without a rule
freezes what it touches.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxprune.graph._axes import Axes, fresh_axes, no_rule
from jaxprune.graph._units import FROZEN, Facts

Rule = Callable[[Facts, dict[str, Any], str, list[Axes], list[tuple[int, ...]]], list[Axes]]


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
        ]
    )
)


def elementwise(name: str) -> Rule:
    """Operands of one shape, scalars or axes of one entry that stretch: indices are equal."""

    def rule(
        facts: Facts, params: Any, source: str, ins: list[Axes], outs: list[tuple[int, ...]]
    ) -> list[Axes]:
        shape = outs[0]
        ids, zero = [], []
        for axis, n in enumerate(shape):
            carrying = [x for x in ins if len(x.shape) == len(shape) and x.shape[axis] == n]
            chosen = min((x.ids[axis] for x in carrying), key=_variety)
            for x in carrying:
                facts.equate(chosen, x.ids[axis])
            ids.append(chosen)
            flags = [
                np.full(n, x.is_zero) | (x.zero[axis] if any(x is c for c in carrying) else False)
                for x in ins
            ]
            zero.append(_zero_of(name, params, flags, [x.value for x in ins]))
        known = ins[0].value if name in _SAME_VALUE else None
        return [Axes(tuple(ids), tuple(zero), known)]

    return rule


def _variety(ids: np.ndarray) -> int:
    """Few ids first: repeated ids remember how an axis was merged."""
    return len(np.unique(ids)) if ids.any() else -1


_SAME_VALUE = ("convert_element_type", "copy", "stop_gradient", "optimization_barrier")


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


def _broadcast(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    (x, *_), shape = ins, params["shape"]
    where = {to: axis for axis, to in enumerate(params["broadcast_dimensions"])}
    ids, zero = [], []
    for to, n in enumerate(shape):
        axis = where.get(to)
        if axis is not None and x.shape[axis] == n:
            ids.append(x.ids[axis])
            zero.append(x.zero[axis])
        else:
            ids.append(facts.fresh(n) if n > 1 else np.full(n, FROZEN))
            zero.append(np.full(n, False))
    return [Axes(tuple(ids), tuple(zero), x.value)]


def _transpose(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    order = params["permutation"]
    x = ins[0]
    return [Axes(tuple(x.ids[i] for i in order), tuple(x.zero[i] for i in order), x.value)]


def _squeeze(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x = ins[0]
    left = [i for i in range(len(x.ids)) if i not in params["dimensions"]]
    for i in params["dimensions"]:
        facts.freeze(x.ids[i], f"one entry is picked at {source}")
    return [Axes(tuple(x.ids[i] for i in left), tuple(x.zero[i] for i in left), x.value)]


def blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """How a reshape maps axes: minimal runs of axes with equal products."""
    found, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        a, b = [], []
        left = right = 1
        if i < len(before):
            a, left, i = [i], before[i], i + 1
        if j < len(after):
            b, right, j = [j], after[j], j + 1
        while left != right:
            if left < right:
                a.append(i)
                left, i = left * before[i], i + 1
            else:
                b.append(j)
                right, j = right * after[j], j + 1
        found.append((a, b))
    return found


def _reshape(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x, shape = ins[0], outs[0]
    if params.get("dimensions") is not None or 0 in shape:
        return no_rule(facts, params, source, ins[:1], outs, "reshape with dimensions")
    ids: dict[int, np.ndarray] = {}
    zero: dict[int, np.ndarray] = {}
    for before, after in blocks(x.shape, shape):
        merged, flags = np.full(1, FROZEN), np.ones(1, bool)
        for axis in before:
            merged, flags = _merge(facts, merged, flags, x.ids[axis], x.zero[axis])
        for k, axis in enumerate(after):
            rest = int(np.prod([shape[i] for i in after[k + 1 :]], dtype=int))
            ids[axis], zero[axis], merged, flags = _split(facts, merged, flags, shape[axis], rest)
    order = range(len(shape))
    return [Axes(tuple(ids[i] for i in order), tuple(zero[i] for i in order), x.value)]


def _merge(
    facts: Facts, a: np.ndarray, za: np.ndarray, b: np.ndarray, zb: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The axis that runs through `b` within each index of `a`."""
    rows, columns = np.repeat(a, len(b)), np.tile(b, len(a))
    zrows, zcolumns = np.repeat(za, len(b)), np.tile(zb, len(a))
    if not a.any():
        return columns, zcolumns
    if not b.any():
        return rows, zrows
    ids = facts.fresh(len(rows))
    facts.product(ids, rows, columns)
    return ids, (zrows | (rows == FROZEN)) & (zcolumns | (columns == FROZEN))


def _split(
    facts: Facts, ids: np.ndarray, zero: np.ndarray, n: int, rest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The outer axis of `n` entries, and what is left within it. Inverse of `_merge`."""
    table, flags = ids.reshape(n, rest), zero.reshape(n, rest)
    zrows, zcolumns = np.asarray(flags.all(1)), np.asarray(flags.all(0))
    frozen = lambda m: (np.full(m, FROZEN), np.zeros(m, bool))
    if rest == 1:
        return ids, zero, *frozen(1)
    if n == 1 or (table == table[:1]).all():  # the same ids in every row
        return *frozen(n), table[0], zcolumns
    if (table == table[:, :1]).all():
        return table[:, 0], zrows, *frozen(rest)
    rows, columns = facts.fresh(n), facts.fresh(rest)
    facts.product(ids, np.repeat(rows, rest), np.tile(columns, n))
    return rows, zrows, columns, zcolumns


def _concatenate(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    axis = params["dimension"]
    ids, zero = [], []
    for i in range(len(outs[0])):
        parts, flags = [x.ids[i] for x in ins], [x.zero[i] | x.is_zero for x in ins]
        if i == axis:
            ids.append(np.concatenate(parts))
            zero.append(np.concatenate(flags))
        else:
            chosen = min(parts, key=_variety)
            for part in parts:
                facts.equate(chosen, part)
            ids.append(chosen)
            zero.append(np.logical_and.reduce(flags))
    return [Axes(tuple(ids), tuple(zero), 0.0 if all(x.is_zero for x in ins) else None)]


def _slice(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x = ins[0]
    strides = params["strides"] or (1,) * len(x.ids)
    cut = [
        slice(a, b, s)
        for a, b, s in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ]
    ids = tuple(v[c] for v, c in zip(x.ids, cut, strict=True))
    zero = tuple(v[c] for v, c in zip(x.zero, cut, strict=True))
    return [Axes(ids, zero, x.value)]


def _split_op(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x, axis, found, start = ins[0], params["axis"], [], 0
    for size in params["sizes"]:
        cut = [slice(None)] * len(x.ids)
        cut[axis] = slice(start, start + size)
        start += size
        found.append(
            Axes(
                tuple(v[c] for v, c in zip(x.ids, cut, strict=True)),
                tuple(v[c] for v, c in zip(x.zero, cut, strict=True)),
                x.value,
            )
        )
    return found


def _pad(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x, ids, zero = ins[0], [], []
    for axis, config in enumerate(params["padding_config"]):
        if config == (0, 0, 0):
            ids.append(x.ids[axis])
            zero.append(x.zero[axis] & ins[1].is_zero)
        else:
            facts.freeze(x.ids[axis], f"padded at {source}")
            ids.append(np.full(outs[0][axis], FROZEN))
            zero.append(np.zeros(outs[0][axis], bool))
    return [Axes(tuple(ids), tuple(zero))]


def _reduce(name: str) -> Rule:
    """A reduction: over indices that are zero when masked, a sum does not see them go."""

    def rule(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
        x, found = ins[0], []
        for axis in params["axes"]:
            unsafe = (
                ~x.zero[axis]
                if name in ("reduce_sum", "reduce_or")
                else np.full(x.shape[axis], True)
            )
            if not x.is_zero or name != "reduce_sum":
                facts.freeze(
                    x.ids[axis][unsafe],
                    f"{name} at {source} runs over indices that do not vanish when masked",
                )
        left = [i for i in range(len(x.ids)) if i not in params["axes"]]
        keeps = name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_or")
        for _ in outs:
            found.append(
                Axes(
                    tuple(x.ids[i] for i in left),
                    tuple(x.zero[i] & keeps for i in left),
                    0.0 if x.is_zero and keeps else None,
                )
            )
        return found

    return rule


def _dot(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    (lhs, rhs), ((lc, rc), (lb, rb)) = ins[:2], params["dimension_numbers"]
    for a, b in zip(lc, rc, strict=True):
        facts.equate(lhs.ids[a], rhs.ids[b])
        safe = lhs.zero[a] | rhs.zero[b] | lhs.is_zero | rhs.is_zero
        reason = f"dot_general at {source} runs over indices that do not vanish when masked"
        facts.freeze(lhs.ids[a][~safe], reason)
        facts.freeze(rhs.ids[b][~safe], reason)
    ids, zero = [], []
    for a, b in zip(lb, rb, strict=True):
        facts.equate(lhs.ids[a], rhs.ids[b])
        ids.append(min(lhs.ids[a], rhs.ids[b], key=_variety))
        zero.append(lhs.zero[a] | rhs.zero[b])
    for x, used in ((lhs, (*lc, *lb)), (rhs, (*rc, *rb))):
        free = [i for i in range(len(x.ids)) if i not in used]
        ids += [x.ids[i] for i in free]
        zero += [x.zero[i] for i in free]
    return [Axes(tuple(ids), tuple(zero), 0.0 if lhs.is_zero or rhs.is_zero else None)]


def _conv(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    lhs, rhs = ins
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    (ln, lc, *ls), (ro, ri, *rs), (on, oc, *_) = spec.lhs_spec, spec.rhs_spec, spec.out_spec
    for x, spatial in ((lhs, ls), (rhs, rs)):
        for axis in spatial:
            facts.freeze(x.ids[axis], f"a window moves along it at {source}")
    ids: list[Any] = [np.full(n, FROZEN) for n in outs[0]]
    zero: list[Any] = [np.zeros(n, bool) for n in outs[0]]
    ids[on], zero[on] = lhs.ids[ln], lhs.zero[ln]
    ids[oc], zero[oc] = rhs.ids[ro], rhs.zero[ro]
    channels, results = lhs.shape[lc], rhs.shape[ro]
    if params["batch_group_count"] != 1 or (
        groups > 1 and (groups != channels or rhs.shape[ri] != 1)
    ):
        return no_rule(facts, params, source, ins, outs, "grouped convolution")
    if groups > 1:
        spread = np.repeat(lhs.ids[lc], results // channels)
        facts.equate(rhs.ids[ro], spread)
        ids[oc] = min(rhs.ids[ro], spread, key=_variety)
        zero[oc] = rhs.zero[ro] | np.repeat(lhs.zero[lc], results // channels)
    else:
        facts.equate(lhs.ids[lc], rhs.ids[ri])
        safe = lhs.zero[lc] | rhs.zero[ri]
        reason = f"convolution at {source} sums over channels that do not vanish when masked"
        facts.freeze(lhs.ids[lc][~safe], reason)
        facts.freeze(rhs.ids[ri][~safe], reason)
    return [Axes(tuple(ids), tuple(zero))]


def _window(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x, ids, zero = ins[0], [], []
    rank = len(x.ids)
    settings = [params.get(k) or (1,) * rank for k in ("window_strides", "base_dilation")]
    padding = params.get("padding") or ((0, 0),) * rank
    for axis in range(rank):
        still = params["window_dimensions"][axis] == 1 and tuple(padding[axis]) == (0, 0)
        if still and all(s[axis] == 1 for s in settings):
            ids.append(x.ids[axis])
            zero.append(x.zero[axis])
        else:
            facts.freeze(x.ids[axis], f"a window moves along it at {source}")
            ids.append(np.full(outs[0][axis], FROZEN))
            zero.append(np.zeros(outs[0][axis], bool))
    return [Axes(tuple(ids), tuple(zero))]


def _gather(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x, index = ins
    spec, sizes = params["dimension_numbers"], params["slice_sizes"]
    for ids in index.ids:
        facts.freeze(ids, f"indices of a gather at {source}")
    if getattr(spec, "operand_batching_dims", ()):
        return no_rule(facts, params, source, ins, outs, "batched gather")
    kept = [i for i in range(len(x.ids)) if i not in spec.collapsed_slice_dims]
    ids = [np.full(n, FROZEN) for n in outs[0]]
    zero = [np.zeros(n, bool) for n in outs[0]]
    for axis in range(len(x.ids)):
        whole = sizes[axis] == x.shape[axis] and axis in kept and axis not in spec.start_index_map
        if whole:
            to = spec.offset_dims[kept.index(axis)]
            ids[to], zero[to] = x.ids[axis], x.zero[axis]
        else:
            facts.freeze(x.ids[axis], f"looked up by index at {source}")
    return [Axes(tuple(ids), tuple(zero))]


def _iota(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    return [fresh_axes(facts, outs[0], zero=False)]


def _reverse(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x = ins[0]
    turn = lambda v, i: v[::-1] if i in params["dimensions"] else v
    return [
        Axes(
            tuple(turn(v, i) for i, v in enumerate(x.ids)),
            tuple(turn(v, i) for i, v in enumerate(x.zero)),
            x.value,
        )
    ]


def _stack(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    ids, zero = _joined(facts, ins, range(len(ins[0].ids)))
    axis, n = params["axis"] % len(outs[0]), len(ins)
    ids.insert(axis, np.full(n, FROZEN))
    zero.insert(axis, np.zeros(n, bool))
    return [Axes(tuple(ids), tuple(zero))]


def _joined(facts: Facts, ins: list[Axes], axes: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids and zeros of some axes along which operands go side by side."""
    ids, zero = [], []
    for axis in axes:
        chosen = min((x.ids[axis] for x in ins), key=_variety)
        for x in ins:
            facts.equate(chosen, x.ids[axis])
        ids.append(chosen)
        zero.append(np.logical_and.reduce([x.zero[axis] | x.is_zero for x in ins]))
    return ids, zero


def _unstack(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x = ins[0]
    axis = params["axis"] % len(x.ids)
    facts.freeze(x.ids[axis], f"its entries are taken apart at {source}")
    left = [i for i in range(len(x.ids)) if i != axis]
    one = Axes(tuple(x.ids[i] for i in left), tuple(x.zero[i] for i in left), x.value)
    return [one] * len(outs)


def _tile(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x, reps = ins[0], params["reps"]
    repeat = lambda values: tuple(np.tile(v, r) for v, r in zip(values, reps, strict=True))
    return [Axes(repeat(x.ids), repeat(x.zero), x.value)]


def _dynamic_slice(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x, ids, zero = ins[0], [], []
    for axis, n in enumerate(outs[0]):
        if n == x.shape[axis]:
            ids.append(x.ids[axis])
            zero.append(x.zero[axis])
        else:
            facts.freeze(x.ids[axis], f"sliced at a computed place at {source}")
            ids.append(np.full(n, FROZEN))
            zero.append(np.zeros(n, bool))
    return [Axes(tuple(ids), tuple(zero))]


def _dynamic_update(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
    x, new = ins[:2]
    for axis in range(len(x.ids)):
        if x.shape[axis] != new.shape[axis]:
            for ids in (x.ids[axis], new.ids[axis]):
                facts.freeze(ids, f"written at a computed place at {source}")
    ids, zero = list(x.ids), [np.zeros(n, bool) for n in x.shape]
    for axis in range(len(x.ids)):
        if x.shape[axis] == new.shape[axis]:
            (ids[axis],), (zero[axis],) = _joined(facts, [x, new], [axis])
    return [Axes(tuple(ids), tuple(zero))]


def _along(name: str) -> Rule:
    """Operations along one axis, side by side on all others: sorts and cumulative sums."""

    def rule(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
        axis = params["dimension"] if name == "sort" else params["axis"]
        axis %= len(outs[0])
        for x in ins:
            facts.freeze(x.ids[axis], f"{name} runs along it at {source}")
        ids, _ = _joined(facts, ins, range(len(outs[0])))
        ids[axis] = np.full(outs[0][axis], FROZEN)
        keeps = name != "cumlogsumexp"
        found = []
        for x in ins:
            zero = [z & keeps for z in x.zero]
            zero[axis] = np.zeros(outs[0][axis], bool)
            found.append(Axes(tuple(ids), tuple(zero)))
        return found

    return rule


RULES: dict[str, Rule] = {
    **{name: elementwise(name) for name in UNARY | BINARY},
    **{
        name: _reduce(name)
        for name in (
            [
                "reduce_sum",
                "reduce_max",
                "reduce_min",
                "reduce_prod",
                "reduce_and",
                "reduce_or",
                "argmax",
                "argmin",
            ]
        )
    },
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _reshape,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "slice": _slice,
    "split": _split_op,
    "pad": _pad,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "gather": _gather,
    "iota": _iota,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    **{
        name: _along(name)
        for name in ("sort", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
    },
    "rev": _reverse,
}
"""The table: add a primitive here, and its counterpart in `_evaluate.RULES` if it names sizes."""
