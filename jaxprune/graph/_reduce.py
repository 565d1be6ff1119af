"""A traced program without what masks remove."""

from typing import NamedTuple

import numpy as np

from jaxprune.graph._evaluate import Plan, plan_of
from jaxprune.graph._removal import Removal
from jaxprune.graph._trace import Graph, needed_without
from jaxprune.graph._vanish import Work, all_work, depends


class Reduced(NamedTuple):
    """What is left of a graph.

    Attributes:
      plan: how to run it.
      kept: per parameter and axis the indices that are left; the first axis of a leaf
        that is gone has none.
      cut_off: numbers of outputs that depended on inputs and do not any more.
    """

    plan: Plan
    kept: list[tuple[np.ndarray, ...]]
    cut_off: tuple[int, ...]


def reduced(graph: Graph, removal: Removal) -> Reduced:
    """A graph without what masks remove.

    Leaves that are masked throughout are taken as zero; what only they feed is not computed, and those
    that feed nothing else are gone with all their entries.
    """
    program, n_params = graph.program, len(graph.paths)
    work = all_work(program)
    gone: set[int] = set()
    cut_off: tuple[int, ...] = ()
    if removal.blank:
        work, gone = needed_without(graph, removal.blank)
        cut_off = _cut_off(graph, work)
    plan = plan_of(program, graph.axes, graph.bodies, removal.ids, work)
    kept = []
    for number in program.inputs[:n_params]:
        left = plan.kept[number]
        kept.append((left[0][:0], *left[1:]) if number in gone and left else left)
    return Reduced(plan, kept, cut_off)


def _cut_off(graph: Graph, work: Work) -> tuple[int, ...]:
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
