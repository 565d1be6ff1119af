"""Rules of look-ups and writes by computed index: what an index runs over stays, whole slices pass."""

from typing import Any

import jax
import numpy as np

from jaxprune.graph._axes import AxisInfo, Rule, joined, passed_or_frozen
from jaxprune.graph._constraints import Constraints


def gather_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x, index = ins
    spec, sizes = params["dimension_numbers"], params["slice_sizes"]
    batch = tuple(getattr(spec, "operand_batching_dims", ()))
    index_batch = tuple(getattr(spec, "start_indices_batching_dims", ()))
    kept = [i for i in range(len(x.ids)) if i not in (*spec.collapsed_slice_dims, *batch)]
    ids = [constraints.fixed(n, f"looked up by index at {source}") for n in outs[0]]
    zero = [np.zeros(n, bool) for n in outs[0]]
    # axes of the indices, but the last, become the other axes of the result
    places = [axis for axis in range(len(outs[0])) if axis not in spec.offset_dims]
    for axis, to in enumerate(places):
        ids[to] = index.ids[axis]
        if axis in index_batch:
            mine = batch[index_batch.index(axis)]
            constraints.equate(x.ids[mine], index.ids[axis])
            zero[to] = x.zero[mine]
    # what is looked up out of bounds is filled along whole slices, or its index is moved inside
    fill, is_filled = params["fill_value"], jax.lax.GatherScatterMode.FILL_OR_DROP
    # (a sum over NaN is NaN, whatever is removed)
    fills = params["mode"] == is_filled and fill is not None and not np.isnan(fill) and fill != 0
    for axis in range(len(x.ids)):
        if sizes[axis] == x.shape[axis] and axis in kept:
            to = spec.offset_dims[kept.index(axis)]
            ids[to], zero[to] = x.ids[axis], x.zero[axis] & (not fills)
        elif _is_named(index, x.shape[axis], axis, spec.start_index_map) and sizes[axis] == 1:
            constraints.equate(x.ids[axis], index.names)
        elif axis not in batch:
            constraints.freeze(x.ids[axis], f"looked up by index at {source}")
    constraints.freeze(index.ids[-1], f"indices of a gather at {source}")
    return [AxisInfo(tuple(ids), tuple(zero), 0.0 if x.is_zero else None, names=x.names)]


def _is_named(index: AxisInfo, n: int, axis: int, indexed: Any) -> bool:
    """Whether indices of one axis name its entries, and none of a masked unit."""
    return tuple(indexed) == (axis,) and index.names is not None and len(index.names) == n


def scatter_rule(name: str) -> Rule:
    """Writes into slices of the first operand: axes that are written whole are those of the update."""

    def rule(
        constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
    ) -> list[AxisInfo]:
        x, index, new = ins
        spec = params["dimension_numbers"]
        batch = tuple(getattr(spec, "operand_batching_dims", ()))
        index_batch = tuple(getattr(spec, "scatter_indices_batching_dims", ()))
        window = [i for i in range(len(x.ids)) if i not in (*spec.inserted_window_dims, *batch)]
        free = [i for i in range(len(new.ids)) if i not in spec.update_window_dims]
        reason = f"written by index at {source}"
        for axis, place in enumerate(free):
            constraints.equate(new.ids[place], index.ids[axis])
        constraints.freeze(index.ids[-1], reason)
        ids, zero = list(x.ids), list(x.zero)
        sums = name in ("scatter", "scatter-add", "scatter_add", "scatter-max", "scatter-min")
        for axis in range(len(x.ids)):
            if axis in batch:
                place = free[index_batch[batch.index(axis)]]
            elif axis in window:
                place = spec.update_window_dims[window.index(axis)]
            else:
                place = None
            named = _is_named(index, x.shape[axis], axis, spec.scatter_dims_to_operand_dims)
            if place is None and named:
                constraints.equate(x.ids[axis], index.names)  # nothing is written where masked
                zero[axis] = x.zero[axis] | x.is_zero
            elif place is None or new.shape[place] != x.shape[axis]:
                constraints.freeze(x.ids[axis], reason)
                if place is not None:
                    constraints.freeze(new.ids[place], reason)
                zero[axis] = np.zeros(x.shape[axis], bool)
            else:
                constraints.equate(x.ids[axis], new.ids[place])
                both = (x.zero[axis] | x.is_zero) & (new.zero[place] | new.is_zero)
                zero[axis] = both & sums
        # places that an index may repeat: each free axis of the update is summed over or overwrites
        for place in free:
            if not any(place == free[i] for i in index_batch):
                constraints.freeze(new.ids[place], reason)
        return [
            AxisInfo(tuple(ids), tuple(zero), 0.0 if x.is_zero and new.is_zero and sums else None)
        ]

    return rule


def dynamic_slice_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x = ins[0]
    whole = [n == full for n, full in zip(outs[0], x.shape, strict=True)]
    reason = f"sliced at a computed place at {source}"
    y = passed_or_frozen(constraints, x, outs[0], whole, reason)
    return [AxisInfo(y.ids, y.zero, x.value)]


def dynamic_update_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x, new = ins[:2]
    for axis in range(len(x.ids)):
        if x.shape[axis] != new.shape[axis]:
            for ids in (x.ids[axis], new.ids[axis]):
                constraints.freeze(ids, f"written at a computed place at {source}")
    ids, zero = list(x.ids), [np.zeros(n, bool) for n in x.shape]
    for axis in range(len(x.ids)):
        if x.shape[axis] == new.shape[axis]:
            (ids[axis],), (zero[axis],) = joined(constraints, [x, new], [axis])
    return [AxisInfo(tuple(ids), tuple(zero), 0.0 if x.is_zero and new.is_zero else None)]


def top_k_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x = ins[0]
    axis = params.get("axis", params.get("reduction_dimension", -1)) % len(x.ids)
    low = x.is_least(axis)
    if low.any() and "recall_target" not in params:  # never among the largest
        reason = f"ranked along it at {source}"
        constraints.freeze(x.ids[axis][~low], reason)
        ids = list(x.ids)
        ids[axis] = constraints.fixed(outs[0][axis], reason)
        zero = [np.zeros(n, bool) if i == axis else x.zero[i] for i, n in enumerate(outs[0])]
        flags = tuple(np.zeros(n, bool) for n in outs[0])
        return [AxisInfo(tuple(ids), tuple(zero)), AxisInfo(tuple(ids), flags, names=x.ids[axis])]
    passes = [i != axis for i in range(len(x.ids))]
    y = passed_or_frozen(constraints, x, outs[0], passes, f"ranked along it at {source}")
    return [y, AxisInfo(y.ids, tuple(np.zeros(len(z), bool) for z in y.zero))]


def leading_rule(name: str, last: int) -> Rule:
    """Operations on the last axes, side by side on all before: linear algebra."""

    def rule(
        constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
    ) -> list[AxisInfo]:
        ids: list[np.ndarray] = []
        lead = min(len(shape) for shape in outs) if outs else 0
        lead = min([lead, *(len(x.ids) - last for x in ins)])
        for x in ins:
            for axis in range(max(lead, 0), len(x.ids)):
                constraints.freeze(x.ids[axis], f"{name} mixes it at {source}")
        if lead > 0:
            ids, _ = joined(constraints, ins, range(lead))
        found = []
        for shape in outs:
            rest = [constraints.fixed(n, f"{name} mixes it at {source}") for n in shape[len(ids) :]]
            found.append(AxisInfo((*ids, *rest), tuple(np.zeros(n, bool) for n in shape)))
        return found

    return rule


def fft_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    """Transforms of the last axes: a vector of zeros stays zero."""
    x, mixed = ins[0], len(params["fft_lengths"])
    lead = len(x.ids) - mixed
    reason = f"a Fourier transform mixes it at {source}"
    for ids in x.ids[lead:]:
        constraints.freeze(ids, reason)
    rest = outs[0][lead:]
    ids = (*x.ids[:lead], *(constraints.fixed(n, reason) for n in rest))
    zero = (*x.zero[:lead], *(np.zeros(n, bool) for n in rest))
    return [AxisInfo(ids, zero, 0.0 if x.is_zero else None)]
