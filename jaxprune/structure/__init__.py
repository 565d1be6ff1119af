"""Structure: units and layers of a traced function, masked whole and removed for good."""

from jaxprune.structure._activation_scores import activation_scores
from jaxprune.structure._candidates import Candidate, candidates
from jaxprune.structure._compact import CompactFunction, compact
from jaxprune.structure._layer_masks import layer_masks
from jaxprune.structure._layer_scores import layer_scores
from jaxprune.structure._layers import Layer, layers
from jaxprune.structure._native import layer_map
from jaxprune.structure._pattern import Units
from jaxprune.structure._route_around import RoutedFunction, route_around
from jaxprune.structure._shrink import shrink
from jaxprune.structure._units import keep_units, unit_masks, widths

__all__ = [
    "Candidate",
    "CompactFunction",
    "Layer",
    "RoutedFunction",
    "Units",
    "activation_scores",
    "candidates",
    "keep_units",
    "layer_map",
    "layer_masks",
    "layer_scores",
    "layers",
    "route_around",
    "shrink",
    "unit_masks",
    "widths",
]
