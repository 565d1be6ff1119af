"""Rules of operations that mix entries: products, convolutions, reductions, windows, look-ups.

What a sum runs over may shrink where a masked index adds zero; everything else that is mixed is frozen.
"""

from typing import Any

import numpy as np

from jaxprune.graph._axes import AxisInfo, Rule, joined, no_rule, passed_or_frozen, plainest
from jaxprune.graph._constraints import Constraints
from jaxprune.graph._elementwise import elementwise
from jaxprune.graph._shapes import split_axis


def reduce_rule(name: str) -> Rule:
    """A reduction: a sum does not see indices go that are zero when masked; those that are all the same
    are counted, see `_counted`.
    """

    def rule(
        constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
    ) -> list[AxisInfo]:
        x, found = ins[0], []
        for axis in params["axes"]:
            unsafe = np.full(x.shape[axis], True)
            if name in ("reduce_sum", "reduce_or"):
                unsafe = ~(x.alike(axis) if name == "reduce_sum" else x.zero[axis])
            elif name in ("reduce_max", "argmax"):
                unsafe = ~x.is_least(axis)
            if not x.is_zero or name != "reduce_sum":
                constraints.freeze(
                    x.ids[axis][unsafe],
                    f"{name} at {source} runs over indices that differ when masked",
                )
        left = [i for i in range(len(x.ids)) if i not in params["axes"]]
        keeps = name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_or")
        for _ in outs:
            found.append(
                AxisInfo(
                    tuple(x.ids[i] for i in left),
                    tuple(x.zero[i] & keeps for i in left),
                    0.0 if x.is_zero and keeps else None,
                    tuple(x.alike(i) for i in left),
                    is_share=x.is_share and name in ("reduce_sum", "reduce_max"),
                    names=x.ids[params["axes"][0]] if name == "argmax" else None,
                )
            )
        return found

    return rule


def collective_rule(name: str) -> Rule:
    """Exchange between devices, entry by entry; axes that `vmap` gave a name are summed over."""
    apart, within = elementwise(name), reduce_rule(_REDUCES.get(name, name))

    def rule(
        constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
    ) -> list[AxisInfo]:
        axes = tuple(axis for axis in params.get("axes", ()) if isinstance(axis, int))
        if not axes:
            return apart(constraints, params, source, ins, outs)
        pairs = zip(ins, outs, strict=True)
        return [within(constraints, {"axes": axes}, source, [x], [shape])[0] for x, shape in pairs]

    return rule


_REDUCES = {"psum": "reduce_sum", "pmax": "reduce_max", "pmin": "reduce_min"}


def dot_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    (lhs, rhs), ((lc, rc), (lb, rb)) = ins[:2], params["dimension_numbers"]
    for a, b in zip(lc, rc, strict=True):
        constraints.equate(lhs.ids[a], rhs.ids[b])
        safe = lhs.zero[a] | rhs.zero[b] | lhs.is_zero | rhs.is_zero
        reason = f"dot_general at {source} runs over indices that are not zero when masked"
        constraints.freeze(lhs.ids[a][~safe], reason)
        constraints.freeze(rhs.ids[b][~safe], reason)
    ids, zero = [], []
    for a, b in zip(lb, rb, strict=True):
        constraints.equate(lhs.ids[a], rhs.ids[b])
        ids.append(plainest((lhs.ids[a], rhs.ids[b])))
        zero.append(lhs.zero[a] | rhs.zero[b])
    for x, used in ((lhs, (*lc, *lb)), (rhs, (*rc, *rb))):
        free = [i for i in range(len(x.ids)) if i not in used]
        ids += [x.ids[i] for i in free]
        zero += [x.zero[i] for i in free]
    return [AxisInfo(tuple(ids), tuple(zero), 0.0 if lhs.is_zero or rhs.is_zero else None)]


def ragged_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    """Rows in groups, each by the matrix of its group: a product of rows, and of any of the matrices."""
    (lhs, rhs, sizes), numbers = ins[:3], params["ragged_dot_dimension_numbers"]
    rows, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    if {*rows} & {*lc, *lb} or len(groups) != 1:
        return no_rule(constraints, params, source, ins, outs, "ragged product of this kind")
    reason = f"rows are divided into groups at {source}"
    constraints.freeze(lhs.ids[rows[0]], reason)
    if len(sizes.ids) == 1:  # a matrix that no row meets may go
        constraints.equate(rhs.ids[groups[0]], sizes.ids[0])
        constraints.freeze(sizes.ids[0][~sizes.zero[0]], reason)
    else:
        for ids in (rhs.ids[groups[0]], *sizes.ids):
            constraints.freeze(ids, reason)
    left = [i for i in range(len(rhs.ids)) if i != groups[0]]  # one matrix, as all others
    one = AxisInfo(tuple(rhs.ids[i] for i in left), tuple(rhs.zero[i] for i in left), rhs.value)
    contract, batch = (tuple(left.index(i) for i in axes) for axes in (rc, rb))
    numbers = ((lc, contract), (lb, batch))
    return dot_rule(constraints, {"dimension_numbers": numbers}, source, [lhs, one], outs)


def conv_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    """Channels in groups: whole groups may go, and so may one place within every group."""
    lhs, rhs = ins
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    (ln, lc, *ls), (ro, ri, *rs), (on, oc, *_) = spec.lhs_spec, spec.rhs_spec, spec.out_spec
    if params["batch_group_count"] != 1:
        return no_rule(constraints, params, source, ins, outs, "convolution with batch groups")
    for x, spatial in ((lhs, ls), (rhs, rs)):
        for axis in spatial:
            constraints.freeze(x.ids[axis], f"a window moves along it at {source}")
    moved = f"a window moves along it at {source}"
    ids: list[Any] = [constraints.fixed(n, moved) for n in outs[0]]
    zero: list[Any] = [np.zeros(n, bool) for n in outs[0]]
    ids[on], zero[on] = lhs.ids[ln], lhs.zero[ln]
    ids[oc], zero[oc] = rhs.ids[ro], rhs.zero[ro]
    within, zero_within = lhs.ids[lc], lhs.zero[lc]
    if groups > 1:
        before, zero_before, within, zero_within = split_axis(
            constraints, lhs.ids[lc], lhs.zero[lc], groups, lhs.shape[lc] // groups
        )
        after, *_ = split_axis(
            constraints, rhs.ids[ro], rhs.zero[ro], groups, rhs.shape[ro] // groups
        )
        constraints.equate(before, after)
        if lhs.shape[lc] == groups:  # depthwise: what comes from a zero channel is zero
            zero[oc] = rhs.zero[ro] | np.repeat(zero_before, rhs.shape[ro] // groups)
    if len(within) > 1:
        constraints.equate(within, rhs.ids[ri])
        safe = zero_within | rhs.zero[ri] | lhs.is_zero | rhs.is_zero
        reason = f"convolution at {source} sums over channels that are not zero when masked"
        constraints.freeze(within[~safe], reason)
        constraints.freeze(rhs.ids[ri][~safe], reason)
    return [AxisInfo(tuple(ids), tuple(zero), 0.0 if lhs.is_zero or rhs.is_zero else None)]


def window_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x = ins[0]
    rank = len(x.ids)
    settings = [params.get(k) or (1,) * rank for k in ("window_strides", "base_dilation")]
    padding = params.get("padding") or ((0, 0),) * rank
    still = [
        params["window_dimensions"][axis] == 1
        and tuple(padding[axis]) == (0, 0)
        and all(s[axis] == 1 for s in settings)
        for axis in range(rank)
    ]
    reason = f"a window moves along it at {source}"
    for other in (v for v in ins[1:] if len(v.ids) == rank):
        for axis in range(rank):
            if still[axis]:
                constraints.equate(x.ids[axis], other.ids[axis])
            else:
                constraints.freeze(other.ids[axis], reason)
    y = passed_or_frozen(constraints, x, outs[0], still, reason)
    return [AxisInfo(y.ids, y.zero, 0.0 if all(v.is_zero for v in ins) else None)] * len(outs)


def along_rule(name: str) -> Rule:
    """Operations along one axis, side by side on all others: sorts and cumulative sums."""

    def rule(
        constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
    ) -> list[AxisInfo]:
        axis = params["dimension"] if name == "sort" else params["axis"]
        axis %= len(outs[0])
        reason = f"{name} runs along it at {source}"
        for x in ins:
            constraints.freeze(x.ids[axis], reason)
        ids, _ = joined(constraints, ins, range(len(outs[0])))
        ids[axis] = constraints.fixed(outs[0][axis], reason)
        keeps = name != "cumlogsumexp"
        found = []
        for x in ins:
            zero = [z & keeps for z in x.zero]
            zero[axis] = np.zeros(outs[0][axis], bool)
            known = 0.0 if x.is_zero and keeps else None
            names = x.names if name == "sort" else None
            found.append(AxisInfo(tuple(ids), tuple(zero), known, names=names))
        return found

    return rule
