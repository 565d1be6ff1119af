"""What a program still has to do when some of its inputs are zero throughout.

A value is *zero* where the rules say so, and *the same* as another where an operation adds zero to it or
copies it. What nothing needs is not run: that is how a masked layer comes to cost nothing.
"""

from collections.abc import Iterable
from typing import NamedTuple

from jaxprune.graph._axes import Axes
from jaxprune.program import Operation, Program

_COPIES = frozenset(
    [
        "copy",
        "copy_p",
        "convert_element_type",
        "reshape",
        "broadcast_in_dim",
        "squeeze",
        "expand_dims",
        "optimization_barrier",
        "name",
        "sharding_constraint",
    ]
)


def same_values(program: Program, axes: tuple[Axes, ...]) -> dict[int, int]:
    """Values that equal an earlier one, by number."""
    same: dict[int, int] = {}
    for operation in program.operations:
        name = operation.primitive.name
        ins, outs = operation.ins, operation.outs
        if name in ("add", "add_any", "sub", "or"):
            left, right = (axes[i].is_zero for i in ins)
            kept = ins[0] if right else ins[1] if left and name != "sub" else None
            pairs = [(kept, outs[0])] if kept is not None else []
        elif name in ("mul", "div"):
            left, right = (axes[i].value == 1 for i in ins)
            kept = ins[0] if right else ins[1] if left and name == "mul" else None
            pairs = [(kept, outs[0])] if kept is not None else []
        elif name == "select_n" and len({same.get(i, i) for i in ins[1:]}) == 1:
            pairs = [(ins[1], outs[0])]
        elif name in _COPIES:
            pairs = list(zip(ins, outs, strict=False))
        else:
            continue
        for before, after in pairs:
            a, b = program.avals[before], program.avals[after]
            if a.shape == b.shape and a.dtype == b.dtype:
                same[after] = same.get(before, before)
    return same


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


def needed_work(program: Program, axes: tuple[Axes, ...]) -> Work:
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


def gone_leaves(program: Program, work: Work, blank: Iterable[int], n_params: int) -> list[int]:
    """Inputs, of those that are zero throughout, that only feed what is not computed any more.

    A masked bias of a layer that lives on is still part of it, though adding zero is not computed.
    """
    data = depends(program.operations, program.inputs[n_params:], all_work(program))
    alive = {i for operation in work.operations for i in operation.outs} | set(program.inputs)
    users: dict[int, list[Operation]] = {}
    for operation in program.operations:
        for i in set(operation.ins):
            users.setdefault(i, []).append(operation)

    def gone(number: int) -> bool:
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
    return [number for number in blank if number not in outputs and gone(number)]
