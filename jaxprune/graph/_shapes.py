"""Rules of operations that move entries without mixing them: reshapes, slices, joins."""

from dataclasses import replace
from typing import Any

import numpy as np

from jaxprune.graph._axes import AxisInfo, fresh_axes, joined, no_rule, passed_or_frozen, plainest
from jaxprune.graph._constraints import FROZEN, LAST_FIXED, Constraints, may_shrink


def broadcast_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    (x, *_), shape = ins, params["shape"]
    where = {to: axis for axis, to in enumerate(params["broadcast_dimensions"])}
    ids, zero, uniform = [], [], []
    for to, n in enumerate(shape):
        axis = where.get(to)
        if axis is not None and x.shape[axis] == n:
            ids.append(x.ids[axis])
            zero.append(x.zero[axis])
            uniform.append(x.alike(axis))
        else:
            ids.append(constraints.fresh(n) if n > 1 else np.full(n, FROZEN))
            zero.append(np.full(n, False))
            uniform.append(np.full(n, True))
    to = {axis: i for i, axis in where.items() if x.shape[axis] == shape[i]}
    return [AxisInfo(tuple(ids), tuple(zero), x.value, tuple(uniform), **x.moved(to, shape))]


def transpose_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x, order = ins[0], params["permutation"]
    ids, zero, alike = zip(*((x.ids[i], x.zero[i], x.alike(i)) for i in order), strict=True)
    more = x.moved({axis: i for i, axis in enumerate(order)}, tuple(x.shape[i] for i in order))
    return [AxisInfo(ids, zero, x.value, alike, **more)]


def squeeze_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x = ins[0]
    left = [i for i in range(len(x.ids)) if i not in params["dimensions"]]
    for i in params["dimensions"]:
        constraints.freeze(x.ids[i], f"one entry is picked at {source}")
    ids, zero, alike = (
        tuple(f(i) for i in left) for f in (x.ids.__getitem__, x.zero.__getitem__, x.alike)
    )
    more = x.moved({axis: i for i, axis in enumerate(left)}, tuple(x.shape[i] for i in left))
    return [AxisInfo(ids, zero, x.value, alike, **more)]


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


def reshape_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x, shape = ins[0], outs[0]
    if 0 in shape:
        return no_rule(constraints, params, source, ins[:1], outs, "reshape without entries")
    if (order := params.get("dimensions")) is not None:  # axes change places first
        (x,) = transpose_rule(constraints, {"permutation": order}, source, ins[:1], outs)
    ids: dict[int, np.ndarray] = {}
    zero: dict[int, np.ndarray] = {}
    for before, after in blocks(x.shape, shape):
        merged, flags = np.full(1, FROZEN), np.ones(1, bool)
        for axis in before:
            merged, flags = _merge(constraints, merged, flags, x.ids[axis], x.zero[axis])
        for k, axis in enumerate(after):
            rest = int(np.prod([shape[i] for i in after[k + 1 :]], dtype=int))
            ids[axis], zero[axis], merged, flags = split_axis(
                constraints, merged, flags, shape[axis], rest
            )
    twins = {to: axis for axis, to in axes_kept(x.shape, shape).items()}
    uniform = {i: x.alike(twins[i]) if i in twins else zero[i] for i in ids}
    listed = lambda found: tuple(found[i] for i in range(len(shape)))
    more = x.moved(axes_kept(x.shape, shape), shape)
    return [AxisInfo(listed(ids), listed(zero), x.value, listed(uniform), **more)]


def axes_kept(before: tuple[int, ...], after: tuple[int, ...]) -> dict[int, int]:
    """The axes that a reshape leaves whole, and where they are afterwards."""
    found = {}
    for left, right in blocks(before, after):
        ins, outs = [i for i in left if before[i] > 1], [i for i in right if after[i] > 1]
        if len(ins) == len(outs) == 1:
            found[ins[0]] = outs[0]
    return found


def _merge(
    constraints: Constraints, a: np.ndarray, za: np.ndarray, b: np.ndarray, zb: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The axis that runs through `b` within each index of `a`."""
    rows, columns = np.repeat(a, len(b)), np.tile(b, len(a))
    zrows, zcolumns = np.repeat(za, len(b)), np.tile(zb, len(a))
    if not may_shrink(a):
        return columns, zcolumns
    if not may_shrink(b):
        return rows, zrows
    ids = constraints.fresh(len(rows))
    constraints.product(ids, rows, columns)
    return ids, (zrows | (rows <= LAST_FIXED)) & (zcolumns | (columns <= LAST_FIXED))


def split_axis(
    constraints: Constraints, ids: np.ndarray, zero: np.ndarray, n: int, rest: int
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
    rows, columns = constraints.fresh(n), constraints.fresh(rest)
    constraints.product(ids, np.repeat(rows, rest), np.tile(columns, n))
    return rows, zrows, columns, zcolumns


def concatenate_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    axis = params["dimension"]
    ids, zero = [], []
    for i in range(len(outs[0])):
        parts, flags = [x.ids[i] for x in ins], [x.zero[i] | x.is_zero for x in ins]
        if i == axis:
            ids.append(np.concatenate(parts))
            zero.append(np.concatenate(flags))
        else:
            chosen = plainest(parts)
            for part in parts:
                constraints.equate(chosen, part)
            ids.append(chosen)
            zero.append(np.logical_and.reduce(flags))
    return [AxisInfo(tuple(ids), tuple(zero), 0.0 if all(x.is_zero for x in ins) else None)]


def slice_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x = ins[0]
    strides = params["strides"] or (1,) * len(x.ids)
    cut = [
        slice(a, b, s)
        for a, b, s in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ]
    ids = tuple(v[c] for v, c in zip(x.ids, cut, strict=True))
    zero = tuple(v[c] for v, c in zip(x.zero, cut, strict=True))
    return [AxisInfo(ids, zero, x.value)]


def split_op_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x, axis, found, start = ins[0], params["axis"], [], 0
    for size in params["sizes"]:
        cut = [slice(None)] * len(x.ids)
        cut[axis] = slice(start, start + size)
        start += size
        found.append(
            AxisInfo(
                tuple(v[c] for v, c in zip(x.ids, cut, strict=True)),
                tuple(v[c] for v, c in zip(x.zero, cut, strict=True)),
                x.value,
            )
        )
    return found


def pad_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    untouched = [config == (0, 0, 0) for config in params["padding_config"]]
    y = passed_or_frozen(constraints, ins[0], outs[0], untouched, f"padded at {source}")
    both = all(x.is_zero for x in ins)
    return [AxisInfo(y.ids, tuple(z & ins[1].is_zero for z in y.zero), 0.0 if both else None)]


def generated_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    """Values made from nothing, or from a key: whatever is needed of them is cut out."""
    for x in ins:
        for ids in x.ids:
            constraints.freeze(ids, f"a seed at {source}")
    made = fresh_axes(constraints, outs[0], zero=False)
    is_iota = "dimension" in params and "dtype" in params and len(outs) == 1
    return [replace(made, counts=params["dimension"] if is_iota else None)]


def reverse_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x = ins[0]
    reverse = lambda v, i: v[::-1] if i in params["dimensions"] else v
    return [
        AxisInfo(
            tuple(reverse(v, i) for i, v in enumerate(x.ids)),
            tuple(reverse(v, i) for i, v in enumerate(x.zero)),
            x.value,
        )
    ]


def stack_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    ids, zero = joined(constraints, ins, range(len(ins[0].ids)))
    axis, n = params["axis"] % len(outs[0]), len(ins)
    ids.insert(axis, np.full(n, FROZEN))
    zero.insert(axis, np.zeros(n, bool))
    return [AxisInfo(tuple(ids), tuple(zero), 0.0 if all(x.is_zero for x in ins) else None)]


def unstack_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x = ins[0]
    axis = params["axis"] % len(x.ids)
    constraints.freeze(x.ids[axis], f"its entries are taken apart at {source}")
    left = [i for i in range(len(x.ids)) if i != axis]
    one = AxisInfo(tuple(x.ids[i] for i in left), tuple(x.zero[i] for i in left), x.value)
    return [one] * len(outs)


def tile_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    x, reps = ins[0], params["reps"]
    repeat = lambda values: tuple(np.tile(v, r) for v, r in zip(values, reps, strict=True))
    return [AxisInfo(repeat(x.ids), repeat(x.zero), x.value)]


def bitcast_rule(
    constraints: Constraints, params: Any, source: str, ins: Any, outs: Any
) -> list[AxisInfo]:
    """Bits read as another type; a last axis comes or goes where the widths differ."""
    x, shape = ins[0], outs[0]
    shared = min(len(x.ids), len(shape))
    for ids in x.ids[shared:]:
        constraints.freeze(ids, f"bits are joined at {source}")
    rest = shape[shared:]
    return [
        AxisInfo(
            (
                *x.ids[:shared],
                *(constraints.fixed(n, f"bits are joined at {source}") for n in rest),
            ),
            (*x.zero[:shared], *(np.zeros(n, bool) for n in rest)),
            0.0 if x.is_zero else None,
        )
    ]
