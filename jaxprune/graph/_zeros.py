"""Zero propagation: the operations that are left to run when some inputs are zero throughout.

A value is *zero* where the rules say so, and *the same* as another where an operation adds zero to it or
hands it on. What nothing needs is not run: that is how a masked layer comes to cost nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxprune.graph._axes import AxisInfo
from jaxprune.program import Kind, Operation, Program, primitive

Values = Mapping[int, AxisInfo] | Sequence[AxisInfo]


def same_values(program: Program, axes: Values) -> dict[int, int]:
    """Values that equal an earlier one, by number."""
    same: dict[int, int] = {}
    for operation in program.operations:
        for before, after in _handed_on(operation, axes, same, program):
            a, b = program.avals[before], program.avals[after]
            if a.shape == b.shape and a.dtype == b.dtype:
                same[after] = same.get(before, before)
    return same


def _handed_on(
    operation: Operation, axes: Values, same: dict[int, int], program: Program
) -> list[tuple[int, int]]:
    """Operands and the results that equal them, where shape and dtype stay."""
    name, ins, outs = operation.name, operation.ins, operation.outs
    known = primitive(name)
    if known.neutral is not None:
        left, right = (axes[i].value == known.neutral for i in ins)
        kept = ins[0] if right else ins[1] if left and known.commutes else None
    elif name == "select_n":
        kept = ins[1] if len({same.get(i, i) for i in ins[1:]}) == 1 else None
    else:
        exact = _is_exact(operation, program.avals[ins[0]].dtype) if ins else False
        return list(zip(ins, outs, strict=False)) if exact else []
    return [] if kept is None else [(kept, outs[0])]


def _is_exact(operation: Operation, dtype: object) -> bool:
    """Whether an operation changes nothing but, perhaps, shape and dtype."""
    kind, params = primitive(operation.name).kind, operation.params
    if kind is Kind.CAST and "mantissa_bits" in params:
        info = jnp.finfo(dtype)
        return params["mantissa_bits"] >= info.nmant and params["exponent_bits"] >= info.nexp
    order = params.get("permutation", ())
    return kind in (Kind.IDENTITY, Kind.CAST, Kind.VIEW) and list(order) == sorted(order)


class Work(NamedTuple):
    """What is left to do.

    Attributes:
      operations: to run, in order.
      same: values that stand for others.
      zero: values that are zero throughout, and not computed.
    """

    operations: list[Operation]
    same: dict[int, int]
    zero: frozenset[int]


def all_work(program: Program) -> Work:
    """Everything."""
    return Work(program.operations, {}, frozenset())


def needed_work(program: Program, axes: Values) -> Work:
    """The operations that outputs need, given what is known of values."""
    same = same_values(program, axes)
    zero = frozenset(
        i
        for operation in program.operations
        for i in operation.outs
        if axes[i].is_zero and i not in program.constants
    )
    inputs = frozenset(i for i in program.inputs if axes[i].is_zero)
    zero |= inputs
    needed = {same.get(i, i) for i in program.outputs} - zero
    kept = []
    for operation in reversed(program.operations):
        if operation.effects or needed.intersection(operation.outs):
            kept.append(operation)
            needed.update({same.get(i, i) for i in operation.ins} - zero)
    return Work(kept[::-1], same, zero)


def depends(operations: Iterable[Operation], sources: Iterable[int], work: Work) -> set[int]:
    """The values that depend on some of the values `sources`."""
    found = set(sources)
    for operation in operations:
        ins = {work.same.get(i, i) for i in operation.ins} - work.zero
        if found & ins:
            found.update(operation.outs)
    return found


def removed_leaves(program: Program, work: Work, masked: Iterable[int], n_params: int) -> list[int]:
    """Inputs, of those that are zero throughout, that only feed what is not computed any more.

    A masked bias of a layer that lives on is still part of it, though adding zero is not computed.
    """
    data = depends(program.operations, program.inputs[n_params:], all_work(program))
    alive = {i for operation in work.operations for i in operation.outs} | set(program.inputs)
    users: dict[int, list[Operation]] = {}
    for operation in program.operations:
        for i in set(operation.ins):
            users.setdefault(i, []).append(operation)

    def is_removed(number: int) -> bool:
        waiting, seen = [number], {number}
        while waiting:
            for operation in users.get(waiting.pop(), ()):
                for out in operation.outs:
                    stands_for = work.same.get(out, out)
                    if out in data:
                        if stands_for not in work.zero and stands_for in alive:
                            return False
                    elif out not in seen:
                        seen.add(out)
                        waiting.append(out)
        return True

    outputs = {work.same.get(i, i) for i in program.outputs} - work.zero
    return [number for number in masked if number not in outputs and is_removed(number)]
