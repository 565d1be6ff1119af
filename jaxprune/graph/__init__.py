"""What shrinks together in a traced program, and how to run it smaller."""

from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._choose import GroupWhere, Only, chosen_groups
from jaxprune.graph._constraints import Solution
from jaxprune.graph._cost import Cost
from jaxprune.graph._couple import RULES
from jaxprune.graph._evaluate import Kept, evaluate
from jaxprune.graph._groups import Group
from jaxprune.graph._kinds import KINDS
from jaxprune.graph._places import Place, frozen_places, places_of
from jaxprune.graph._reduce import Reduced, reduced
from jaxprune.graph._removal import Removal, removal_of
from jaxprune.graph._residual import Block, iterations_of, residual_blocks
from jaxprune.graph._routing import NO_EXPERT
from jaxprune.graph._states import States, full_sizes, state_inputs, state_name
from jaxprune.graph._summary import Reason, Summary
from jaxprune.graph._trace import Graph, trace

__all__ = ["AxisInfo", "Cost", "Graph", "Group", "Reason", "Solution", "Summary"]
