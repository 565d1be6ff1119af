"""Rules of operations that mix entries: products, convolutions, reductions, windows, look-ups.

What a sum runs over may shrink where a masked index adds zero; everything else that is mixed is frozen.
"""

from typing import Any

import numpy as np

from jaxprune.graph._axes import Axes, Rule, joined, no_rule, passed_or_frozen, variety
from jaxprune.graph._units import FROZEN, Facts


def reduce_rule(name: str) -> Rule:
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


def dot_rule(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
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
        ids.append(min(lhs.ids[a], rhs.ids[b], key=variety))
        zero.append(lhs.zero[a] | rhs.zero[b])
    for x, used in ((lhs, (*lc, *lb)), (rhs, (*rc, *rb))):
        free = [i for i in range(len(x.ids)) if i not in used]
        ids += [x.ids[i] for i in free]
        zero += [x.zero[i] for i in free]
    return [Axes(tuple(ids), tuple(zero), 0.0 if lhs.is_zero or rhs.is_zero else None)]


def conv_rule(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
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
        ids[oc] = min(rhs.ids[ro], spread, key=variety)
        zero[oc] = rhs.zero[ro] | np.repeat(lhs.zero[lc], results // channels)
    else:
        facts.equate(lhs.ids[lc], rhs.ids[ri])
        safe = lhs.zero[lc] | rhs.zero[ri]
        reason = f"convolution at {source} sums over channels that do not vanish when masked"
        facts.freeze(lhs.ids[lc][~safe], reason)
        facts.freeze(rhs.ids[ri][~safe], reason)
    return [Axes(tuple(ids), tuple(zero))]


def window_rule(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
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
    return [passed_or_frozen(facts, x, outs[0], still, f"a window moves along it at {source}")]


def gather_rule(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
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


def along_rule(name: str) -> Rule:
    """Operations along one axis, side by side on all others: sorts and cumulative sums."""

    def rule(facts: Facts, params: Any, source: str, ins: Any, outs: Any) -> list[Axes]:
        axis = params["dimension"] if name == "sort" else params["axis"]
        axis %= len(outs[0])
        for x in ins:
            facts.freeze(x.ids[axis], f"{name} runs along it at {source}")
        ids, _ = joined(facts, ins, range(len(outs[0])))
        ids[axis] = np.full(outs[0][axis], FROZEN)
        keeps = name != "cumlogsumexp"
        found = []
        for x in ins:
            zero = [z & keeps for z in x.zero]
            zero[axis] = np.zeros(outs[0][axis], bool)
            found.append(Axes(tuple(ids), tuple(zero)))
        return found

    return rule
