"""The traced program of a function, and how to run it: what every other room reads."""

from jaxprune.program._affine import Norm, biases_of, norms_of
from jaxprune.program._layout import Layout, layout_of, restored, standard
from jaxprune.program._nested import RUN, carries_of, nested_run, split_scan
from jaxprune.program._primitives import (
    PRIMITIVES,
    Kind,
    Primitive,
    is_elementwise,
    is_identity,
    is_product,
    is_view,
    primitive,
    root,
    same_numbers,
)
from jaxprune.program._program import (
    Inputs,
    Operation,
    Program,
    inputs_of,
    open_program,
    trace_program,
)
from jaxprune.program._run import Hook, observe, run_operation
from jaxprune.program._track import Follower, Found, Held, Use
from jaxprune.program._uses import uses, uses_of_program

__all__ = ["Operation", "Program", "uses"]
