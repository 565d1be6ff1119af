"""What shrinks together in a traced program, and how to run it smaller."""

from jaxprune.graph._axes import Axes
from jaxprune.graph._cost import Cost
from jaxprune.graph._evaluate import Plan, evaluate
from jaxprune.graph._groups import Group
from jaxprune.graph._places import Place, places_of
from jaxprune.graph._reduce import Reduced, reduced
from jaxprune.graph._removal import Removal, removal_of
from jaxprune.graph._residual import Block, residual_blocks, turns_of
from jaxprune.graph._trace import Graph, trace
from jaxprune.graph._units import Units

__all__ = ["Axes", "Cost", "Graph", "Group", "Units"]
