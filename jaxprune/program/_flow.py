"""Who makes and who reads each value of a program, inner programs included.

Nested operations are replaced by what they run: *links* tie the inputs and outputs of an inner program to
the values around it. An input that a body only reads has the numbers of the operand (`enter`), one that
is a slice of it is a view (`iterate`); what is carried, stacked or chosen between branches is new.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jaxprune.program._nested import nesting_of
from jaxprune.program._primitives import root, same_numbers
from jaxprune.program._program import Operation, Program


class Link(NamedTuple):
    """Stands for the primitive of a link."""

    name: str


_LINKS = {"read": "enter", "slice": "iterate"}  # others are no views


def _link(how: str, ins: list[int], out: int) -> Operation:
    return Operation(Link(_LINKS.get(how, how)), {}, tuple(ins), (out,), "")


def flat(program: Program) -> Iterator[Operation]:
    """The operations of a program and of all within it, and links between them."""
    for operation in program.operations:
        nesting = nesting_of(operation)
        if nesting is None:
            yield operation
            continue
        last = operation.inner[-1]
        carries = [i for i, how in enumerate(nesting.hows) if how == "carry"]
        for inner, operands in zip(operation.inner, nesting.operands, strict=True):
            for number, i in zip(inner.inputs, operands, strict=True):
                ins = [operation.ins[i]]
                if i in carries:
                    ins.append(last.outputs[carries.index(i)])
                yield _link(nesting.hows[i], ins, number)
            yield from flat(inner)
        for i, (how, out) in enumerate(zip(nesting.results, operation.outs, strict=True)):
            sources = operation.inner if how == "branch" else (last,)
            yield _link(how, [inner.outputs[i] for inner in sources], out)


def programs_in(program: Program) -> Iterator[Program]:
    """A program, and all within it."""
    yield program
    for operation in program.operations:
        for inner in operation.inner:
            yield from programs_in(inner)


class Flow:
    """Makers and readers of values.

    Attributes:
      program: the program.
      operations: its operations and those within, and links, in order.
      makers: the operation that makes each value.
      constants: by number.
      leaves: position of each parameter, by number.
      data: values that depend on inputs other than parameters.
    """

    def __init__(self, program: Program, n_leaves: int) -> None:
        self.program = program
        self.operations = tuple(flat(program))
        self.makers: dict[int, Operation] = {}
        self.users: dict[int, list[Operation]] = {}
        for operation in self.operations:
            self.makers.update(dict.fromkeys(operation.outs, operation))
            for number in set(operation.ins):
                self.users.setdefault(number, []).append(operation)
        self.constants = {i: x for p in programs_in(program) for i, x in p.constants.items()}
        self.leaves = {number: i for i, number in enumerate(program.inputs[:n_leaves])}
        self.data = set(program.inputs[n_leaves:])
        size = -1
        while size < len(self.data):  # what a loop carries depends on what its body makes of it
            size = len(self.data)
            for operation in self.operations:
                if not self.data.isdisjoint(operation.ins):
                    self.data.update(operation.outs)

    def root(self, number: int) -> int:
        """What a value is, apart from its axes and type."""
        return root(self.makers, number, views=True)

    def leaf(self, number: int) -> int | None:
        """The position of the parameter that a value is a view of."""
        return self.leaves.get(self.root(number))

    def readers(self, number: int) -> list[Operation | None]:
        """What reads a value under any of its names: operations, and `None` for an output."""
        found: list[Operation | None] = []
        waiting, seen = [number], {number}
        while waiting:
            value = waiting.pop()
            found += [None] * self.program.outputs.count(value)
            for user in self.users.get(value, ()):
                if not same_numbers(user, views=True):
                    found += [user] * user.ins.count(value)
                    continue
                names = {out for i, out in zip(user.ins, user.outs, strict=False) if i == value}
                waiting += names - seen
                seen |= names
        return found
