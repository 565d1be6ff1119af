"""A walk over a program: the axes of every value, by the rules of the operations."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune.graph._axes import AxisInfo, fresh_axes, input_axes, no_rule
from jaxprune.graph._constraints import Constraints
from jaxprune.graph._couple import RULES
from jaxprune.graph._nested import nested_rule
from jaxprune.graph._states import StateLeaf
from jaxprune.program import Program, is_symbolic, sized


def couple(
    program: Program,
    n_params: int,
    updated: dict[int, int],
    names: Sequence[str],
    states: Sequence[StateLeaf] = (),
) -> tuple[Constraints, tuple[AxisInfo, ...]]:
    """Constraints, and the axes of every value of a program.

    Args:
      program: the program.
      n_params: how many of its first inputs are parameters.
      updated: which outputs are updated copies of which parameters, by position.
      names: of the other inputs.
      states: inputs that shrink with the parameters.
    """
    zero: dict[int, tuple[np.ndarray, ...]] = {}
    while True:  # states count as zero where they are masked, until what is written there is not
        constraints, axes = _coupled(program, n_params, updated, names, states, zero)
        known = {state.input: axes[program.inputs[n_params + state.input]].zero for state in states}
        zero = {state.input: _zero_after(program, axes, n_params, state) for state in states}
        pairs = [pair for i, flags in known.items() for pair in zip(flags, zero[i], strict=True)]
        if all((a == b).all() for a, b in pairs):
            return constraints, axes


def _zero_after(
    program: Program, axes: tuple[AxisInfo, ...], n_params: int, state: StateLeaf
) -> tuple[np.ndarray, ...]:
    """Where a state is zero when masked, after a call too."""
    before = axes[program.inputs[n_params + state.input]]
    if state.output is None:
        return before.zero
    after = axes[program.outputs[state.output]]
    return tuple(
        a & (b | after.is_zero) if len(a) == len(b) else np.zeros(len(a), bool)
        for a, b in zip(before.zero, after.zero, strict=True)
    )


def _coupled(
    program: Program,
    n_params: int,
    updated: dict[int, int],
    names: Sequence[str],
    states: Sequence[StateLeaf],
    zero: dict[int, tuple[np.ndarray, ...]],
) -> tuple[Constraints, tuple[AxisInfo, ...]]:
    """Likewise, given where states are zero; everywhere by default."""
    constraints = Constraints()
    constraints.is_symbolic = any(is_symbolic(program.avals[i].shape) for i in program.inputs)
    shapes = [sized(tuple(program.avals[number].shape)) for number in program.inputs]
    ins = [fresh_axes(constraints, shape, zero=True) for shape in shapes[:n_params]]
    ins += [input_axes(constraints, *item) for item in zip(shapes[n_params:], names, strict=True)]
    for state in states:
        position = n_params + state.input
        free = fresh_axes(constraints, shapes[position], zero=True)
        ins[position] = AxisInfo(free.ids, zero.get(state.input, free.zero))
    walk(program, ins, constraints)
    found = constraints.values
    twins = {state.output: n_params + state.input for state in states} | updated
    for position, number in enumerate(program.outputs):
        twin = twins.get(position)
        for axis, ids in enumerate(found[number].ids):
            other = None if twin is None else ins[twin].ids[axis]
            if other is not None and len(other) == len(ids):
                constraints.equate(ids, other)
                continue
            constraints.freeze(ids, f"reaches output {position}")
            if other is not None:
                constraints.freeze(other, f"a state that grows, at output {position}")
    unused = AxisInfo((), ())
    return constraints, tuple(found.get(i, unused) for i in range(len(program.avals)))


def walk(program: Program, ins: list[AxisInfo], constraints: Constraints) -> None:
    """Puts the axes of every value of a program, given those of its inputs, into `constraints.values`."""
    found = constraints.values
    found.update(zip(program.inputs, ins, strict=True))
    for number, value in program.constants.items():
        known = fresh_axes(constraints, tuple(np.shape(value)), zero=False)
        found[number] = AxisInfo(known.ids, known.zero, _number(value))
    for operation in program.operations:
        operands = [found[i] for i in operation.ins]
        shapes = [tuple(program.avals[i].shape) for i in operation.outs]
        params = operation.params
        if constraints.is_symbolic:
            shapes, params = [sized(shape) for shape in shapes], sized(params)
        nested, rule = nested_rule(operation), RULES.get(operation.name)
        if nested is not None:
            outs = nested(walk, constraints, operation, operands, shapes)
        elif rule is not None:
            outs = rule(constraints, params, operation.source, operands, shapes)
        else:
            outs = no_rule(constraints, params, operation.source, operands, shapes, operation.name)
        found.update(zip(operation.outs, outs, strict=True))


def _number(value: Any) -> float | None:
    if np.shape(value) or not np.issubdtype(np.asarray(value).dtype, np.number):
        return None
    return float(np.real(np.asarray(value)))
