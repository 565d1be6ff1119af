"""One traced program, read several ways: what shrinks together, and how to run it smaller."""

from jaxprune.graph._axes import Axes
from jaxprune.graph._cost import Cost
from jaxprune.graph._evaluate import evaluate, plan_of
from jaxprune.graph._program import Program, trace_program
from jaxprune.graph._trace import Graph, Group, couple, trace, updated_leaves
from jaxprune.graph._units import Facts, Units

__all__ = ["Axes", "Cost", "Facts", "Graph", "Group", "Program", "Units"]
