"""Rules of operations that hold programs: loops, branches, mapped shards, functions with own gradients.

Each walks the inner programs with the ids of its operands. What a loop carries keeps its axes: ids out
equal ids in. Whether a carried value is zero when masked is assumed and then checked, until it holds for
every iteration. A scan over stacked layers may lose an iteration where that one, masked, hands on its
carry unchanged.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph._axes import AxisInfo, joined, passed_or_frozen
from jaxprune.graph._constraints import FROZEN, Constraints
from jaxprune.graph._zeros import same_values
from jaxprune.program import Operation, Program, nesting_of, split_scan

Walk = Callable[[Program, list[AxisInfo], Constraints], None]
"""Puts the axes of every value of a program into `constraints.values`."""
NestedRule = Callable[
    [Walk, Constraints, Operation, list[AxisInfo], list[tuple[int, ...]]], list[AxisInfo]
]


def _entered(
    walk: Walk, constraints: Constraints, program: Program, ins: list[AxisInfo]
) -> list[AxisInfo]:
    """Walks an inner program: the axes of its results."""
    walk(program, ins, constraints)
    return [constraints.values[i] for i in program.outputs]


def _carried(constraints: Constraints, start: AxisInfo) -> AxisInfo:
    """A carried value: fresh ids, and zero where the start is. A known number is known no more."""
    ids = tuple(constraints.fresh(n) if n > 1 else np.full(n, FROZEN) for n in start.shape)
    return AxisInfo(ids, tuple(z | start.is_zero for z in start.zero))


def _settled(
    constraints: Constraints,
    start: list[AxisInfo],
    iteration: Callable[[list[AxisInfo]], list[AxisInfo]],
) -> tuple[list[AxisInfo], list[AxisInfo]]:
    """The carry of a loop, tied to itself, and the results of the body walked with it."""
    carry = [_carried(constraints, x) for x in start]
    while True:
        results = iteration(carry)
        for values in zip(carry, start, results, strict=False):
            for a, b, c in zip(*(x.ids for x in values), strict=True):
                constraints.equate(a, b)
                constraints.equate(a, c)
        weaker = [
            AxisInfo(x.ids, tuple(a & (b | y.is_zero) for a, b in zip(x.zero, y.zero, strict=True)))
            for x, y in zip(carry, results, strict=False)
        ]
        if all(
            (a == b).all()
            for x, y in zip(carry, weaker, strict=True)
            for a, b in zip(x.zero, y.zero, strict=True)
        ):
            return carry, results
        carry = weaker


def scan_rule(
    walk: Walk,
    constraints: Constraints,
    operation: Operation,
    ins: list[AxisInfo],
    outs: list[tuple[int, ...]],
) -> list[AxisInfo]:
    """Recurrent networks, whose carry is coupled with itself, and stacked layers."""
    (program,), (n_consts, n_carry) = operation.inner, split_scan(operation.params)
    first, length = n_consts + n_carry, operation.params["length"]
    consts, scanned = ins[:n_consts], ins[first:]
    slices = [AxisInfo(x.ids[1:], x.zero[1:], x.value) for x in scanned]
    iteration = lambda carry: _entered(walk, constraints, program, [*consts, *carry, *slices])
    carry, results = _settled(constraints, ins[n_consts:first], iteration)
    masked = _masked_iteration(walk, program, consts, carry, scanned)
    passes = scanned and all(
        masked.same.get(out, out) == into
        for out, into in zip(program.outputs, program.inputs[n_consts:first], strict=False)
    )
    steps, zero = np.full(length, FROZEN), np.zeros(length, bool)
    if passes:
        steps = constraints.fresh(length)
        constraints.iterations.append(steps)
        for x in scanned:
            constraints.equate(steps, x.ids[0])
    else:
        reason = f"scanned over at {operation.source}, where a masked iteration changes the carry"
        for x in scanned:
            constraints.freeze(x.ids[0], reason)
    stacked = []
    for number, x in zip(program.outputs[n_carry:], results[n_carry:], strict=True):
        flags = (zero | masked.values[number].is_zero) if passes else zero
        stacked.append(AxisInfo((steps, *x.ids), (flags, *x.zero)))
    return [*carry, *stacked]


class _Masked(NamedTuple):
    values: dict[int, AxisInfo]
    same: dict[int, int]


def _masked_iteration(
    walk: Walk,
    program: Program,
    consts: list[AxisInfo],
    carry: list[AxisInfo],
    scanned: list[AxisInfo],
) -> _Masked:
    """What an iteration does once its slices are masked: values that are zero or stay as they were."""
    slices = [AxisInfo(x.ids[1:], x.zero[1:], 0.0 if x.zero[0].all() else x.value) for x in scanned]
    scratch = Constraints()
    walk(program, [*consts, *carry, *slices], scratch)
    return _Masked(scratch.values, same_values(program, scratch.values))


def while_rule(
    walk: Walk,
    constraints: Constraints,
    operation: Operation,
    ins: list[AxisInfo],
    outs: list[tuple[int, ...]],
) -> list[AxisInfo]:
    """A loop with a condition; what decides about another iteration must see the same numbers."""
    test, body = operation.inner
    a = operation.params["cond_nconsts"]
    b = a + operation.params["body_nconsts"]
    iteration = lambda carry: _entered(walk, constraints, body, [*ins[a:b], *carry])
    carry, _ = _settled(constraints, ins[b:], iteration)
    (decided,) = _entered(walk, constraints, test, [*ins[:a], *carry])
    for ids in decided.ids:
        constraints.freeze(ids, f"decides about a loop at {operation.source}")
    return carry


def cond_rule(
    walk: Walk,
    constraints: Constraints,
    operation: Operation,
    ins: list[AxisInfo],
    outs: list[tuple[int, ...]],
) -> list[AxisInfo]:
    """Branches: they agree about the axes of what they return."""
    found = [_entered(walk, constraints, branch, ins[1:]) for branch in operation.inner]
    results = []
    for values in zip(*found, strict=True):
        ids, zero = joined(constraints, list(values), range(len(values[0].ids)))
        known = 0.0 if all(x.is_zero for x in values) else None
        results.append(AxisInfo(tuple(ids), tuple(zero), known))
    return results


def custom_rule(
    walk: Walk,
    constraints: Constraints,
    operation: Operation,
    ins: list[AxisInfo],
    outs: list[tuple[int, ...]],
) -> list[AxisInfo]:
    """A function with a gradient of its own: walked open, run closed."""
    return _entered(walk, constraints, operation.inner[0], ins)


def shard_rule(
    walk: Walk,
    constraints: Constraints,
    operation: Operation,
    ins: list[AxisInfo],
    outs: list[tuple[int, ...]],
) -> list[AxisInfo]:
    """A function mapped over shards: axes that are not split pass; those that are stay."""
    (program,), params = operation.inner, operation.params
    reason = f"split over devices by shard_map at {operation.source}"
    shapes = [tuple(program.avals[number].shape) for number in program.inputs]
    local = [
        _divided(constraints, x, spec, shape, reason)
        for x, spec, shape in zip(ins, params["in_specs"], shapes, strict=True)
    ]
    results = _entered(walk, constraints, program, local)
    return [
        replace(_divided(constraints, x, spec, shape, reason), value=None)
        for x, spec, shape in zip(results, params["out_specs"], outs, strict=True)
    ]


def _divided(
    constraints: Constraints, x: AxisInfo, spec: Any, shape: tuple[int, ...], reason: str
) -> AxisInfo:
    """A value on the other side of a split over devices, of `shape` there: split axes freeze."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    passes = [entry is None for entry in entries]
    return replace(passed_or_frozen(constraints, x, shape, passes, reason), value=x.value)


_RULES: dict[str, NestedRule] = {
    "scan": scan_rule,
    "while": while_rule,
    "cond": cond_rule,
    "custom_vjp_call": custom_rule,
    "shard_map": shard_rule,
}


def nested_rule(operation: Operation) -> NestedRule | None:
    """The rule of an operation whose programs can be entered, with at least one iteration."""
    entered = nesting_of(operation) is not None and operation.params.get("length", 1)
    return _RULES.get(operation.name) if entered else None


def scanned_ids(operation: Operation, axes: tuple[AxisInfo, ...]) -> np.ndarray | None:
    """The ids of the iterations of a scan, where it runs over anything."""
    if operation.name != "scan":
        return None
    slices = operation.ins[sum(split_scan(operation.params)) :]
    return axes[slices[0]].ids[0] if slices else None
