"""Residual blocks: where a value is added to something computed from it."""

from typing import NamedTuple

import numpy as np

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._constraints import Constraints
from jaxprune.graph._nested import scanned_ids
from jaxprune.graph._trace import Graph, walk
from jaxprune.program import Operation, Program, primitive, same_numbers


class Block(NamedTuple):
    """A branch that is added to the stream it came from.

    Attributes:
      before: number of the value that goes around the branch.
      after: number of the sum.
      leaves: positions of the parameters that only the branch reads.
    """

    before: int
    after: int
    leaves: tuple[int, ...]


def residual_blocks(graph: Graph) -> list[Block]:
    """The branches that are zero when the parameters that only they read are masked, in order."""
    return _Search(graph).blocks()


def iterations_of(graph: Graph) -> dict[int, np.ndarray]:
    """The ids of the iterations of each scan, by the number of its first result."""
    found = {}
    for operation in graph.program.operations:
        ids = scanned_ids(operation, graph.axes)
        if ids is not None:
            found[operation.outs[0]] = ids
    return found


class _Search:
    """Who makes and who uses each value; what depends on data."""

    def __init__(self, graph: Graph) -> None:
        self.graph, program = graph, graph.program
        self.positions = {number: i for i, number in enumerate(program.inputs[: len(graph.paths)])}
        self.data = set(program.inputs[len(graph.paths) :])
        self.by_id = {id(operation): operation for operation in program.operations}
        self.maker: dict[int, Operation] = {}
        self.users: dict[int, list[int]] = {}
        for operation in program.operations:
            if self.data.intersection(operation.ins):
                self.data.update(operation.outs)
            self.maker.update(dict.fromkeys(operation.outs, operation))
            for i in set(operation.ins):
                self.users.setdefault(i, []).append(id(operation))
        self.uses_leaf: dict[int, frozenset[int]] = {}

    def blocks(self) -> list[Block]:
        found: list[Block] = []
        around: dict[int, int] = {}  # sum -> the stream before it
        for operation in self.graph.program.operations:
            if primitive(operation.name).neutral != 0:
                continue
            (a, b), (out,) = operation.ins, operation.outs
            if not {a, b} <= self.data:
                continue
            for skip, branch in ((a, b), (b, a)):
                if self._shape(skip) != self._shape(out):
                    continue
                block = self._block(skip, branch, out, around)
                if block is not None:
                    found.append(block)
                    around[out] = skip
                    break
        return found

    def _shape(self, number: int) -> tuple[int, ...]:
        return self.graph.program.avals[number].shape

    def _block(self, skip: int, branch: int, out: int, around: dict[int, int]) -> Block | None:
        stream = {skip}
        number = skip
        while True:  # the stream under other names, and before a parallel branch joined it
            maker = self.maker.get(number)
            if number in around:
                number = around[number]
            elif maker is not None and same_numbers(maker, views=True):
                number = maker.ins[maker.outs.index(number)]
            else:
                break
            stream.add(number)
        operations, leaves, reached = self._within(branch, stream)
        if not reached:
            return None
        members = {id(operation) for operation in operations}
        # the sum of another block, or what came of it, goes on elsewhere: no way around that block
        passed: set[int] = set()
        for operation in operations:
            if passed.intersection(operation.ins) or around.keys() & set(operation.outs):
                passed.update(operation.outs)
        for number in passed - {branch}:
            if not members.issuperset(self.users.get(number, ())):
                return None
        own = sorted(leaf for leaf in leaves if self._users_of(leaf) <= members)
        if own and self._is_zero(operations, branch, own):
            return Block(skip, out, tuple(self.positions[leaf] for leaf in own))
        return None

    def _within(self, branch: int, stream: set[int]) -> tuple[list[Operation], set[int], bool]:
        """What computes a branch: operations, parameters, and whether the stream is read."""
        first = min(stream)
        waiting, seen, leaves, reached = [branch], {branch}, set(), False
        operations: dict[int, Operation] = {}
        while waiting:
            number = waiting.pop()
            if number in stream:
                reached = True
                continue
            if number in self.positions:
                leaves.add(number)
            maker = self.maker.get(number)
            # values older than the stream come from outside, unless they are views of parameters
            if maker is None or (number < first and number in self.data):
                continue
            operations[id(maker)] = maker
            for i in maker.ins:
                if i not in seen:
                    seen.add(i)
                    waiting.append(i)
        return sorted(operations.values(), key=lambda x: x.outs[0]), leaves, reached

    def _users_of(self, leaf: int) -> frozenset[int]:
        """Operations that read a parameter, or a view of it that depends on no data."""
        if leaf not in self.uses_leaf:
            waiting, found = [leaf], set()
            while waiting:
                for user in self.users.get(waiting.pop(), ()):
                    if user not in found:
                        found.add(user)
                        waiting += [i for i in self.by_id[user].outs if i not in self.data]
            self.uses_leaf[leaf] = frozenset(found)
        return self.uses_leaf[leaf]

    def _is_zero(self, operations: list[Operation], branch: int, leaves: list[int]) -> bool:
        """Whether the branch is zero throughout once these parameters are."""
        made = {i for operation in operations for i in operation.outs}
        needed = {i for operation in operations for i in operation.ins} - made
        constants = {i: v for i, v in self.graph.program.constants.items() if i in needed}
        inputs = sorted(needed - set(constants))
        part = Program(self.graph.program.avals, constants, inputs, operations, [branch])
        known = [self.graph.axes[i] for i in inputs]
        ins = [
            AxisInfo(
                x.ids,
                tuple(np.zeros(len(z), bool) for z in x.zero),
                0.0 if i in leaves else x.value,
            )
            for i, x in zip(inputs, known, strict=True)
        ]
        scratch = Constraints()
        walk(part, ins, scratch)
        return scratch.values[branch].is_zero
