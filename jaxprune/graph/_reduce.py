"""A traced program without what masks remove."""

from typing import NamedTuple

from jaxprune.graph._evaluate import Kept, Plan, plan_of
from jaxprune.graph._removal import Removal
from jaxprune.graph._trace import Graph, needed_without
from jaxprune.graph._zeros import Work, all_work, depends


class Reduced(NamedTuple):
    """What is left of a graph.

    Attributes:
      plan: how to run it.
      kept: per parameter and axis the indices that are left; the first axis of a leaf
        that is removed has none.
      disconnected: numbers of outputs that depended on inputs and do not any more.
    """

    plan: Plan
    kept: list[Kept]
    disconnected: tuple[int, ...]

    @property
    def used(self) -> list[Kept]:
        """Per parameter and axis the indices that the plan takes, zeros for removed leaves included."""
        return [self.plan.kept[i] for i in self.plan.program.inputs[: len(self.kept)]]


def reduced(graph: Graph, removal: Removal) -> Reduced:
    """A graph without what masks remove.

    Leaves that are masked throughout are taken as zero; what only they feed is not computed, and those
    that feed nothing else are removed with all their entries.
    """
    program, n_params = graph.program, len(graph.paths)
    work = all_work(program)
    removed: set[int] = set()
    disconnected: tuple[int, ...] = ()
    if removal.fully_masked:
        work, removed = needed_without(graph, removal.fully_masked)
        disconnected = _disconnected(graph, work)
    plan = plan_of(program, graph.axes, removal.ids, work)
    kept = []
    for number in program.inputs[:n_params]:
        left = plan.kept[number]
        kept.append((left[0][:0], *left[1:]) if number in removed and left else left)
    return Reduced(plan, kept, disconnected)


def _disconnected(graph: Graph, work: Work) -> tuple[int, ...]:
    program, n_params = graph.program, len(graph.paths)
    data = program.inputs[n_params:]
    before = depends(program.operations, data, all_work(program))
    after = depends(work.operations, data, work)
    stands = lambda number: work.same.get(number, number)
    return tuple(
        position
        for position, number in enumerate(program.outputs)
        if number in before and (stands(number) in work.zero or stands(number) not in after)
    )
