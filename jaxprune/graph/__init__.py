"""One traced program, read several ways: what shrinks together, and how to run it smaller."""

from jaxprune.graph._affine import Norm, biases_of, norms_of
from jaxprune.graph._axes import Axes
from jaxprune.graph._cost import Cost
from jaxprune.graph._evaluate import Plan, evaluate, observe, run_operation
from jaxprune.graph._follow import Follower, Found, Held, Use
from jaxprune.graph._groups import Group
from jaxprune.graph._layout import Layout, layout_of, restored, standard
from jaxprune.graph._nested import carries_of, nested_run
from jaxprune.graph._places import Place, places_of
from jaxprune.graph._program import (
    Inputs,
    Operation,
    Program,
    inputs_of,
    open_program,
    trace_program,
)
from jaxprune.graph._reduce import Reduced, reduced
from jaxprune.graph._removal import Removal, removal_of
from jaxprune.graph._residual import Block, residual_blocks, turns_of
from jaxprune.graph._trace import Graph, trace
from jaxprune.graph._units import Units

__all__ = ["Axes", "Cost", "Graph", "Group", "Operation", "Program", "Units"]
