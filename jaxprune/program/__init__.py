"""The traced program of a function, and how to run it: what every other room reads."""

from jaxprune.program._affine import Norm, Pair, biases_of, norms_of
from jaxprune.program._flow import Flow, programs_in
from jaxprune.program._inputs import Inputs, TraceCache, inputs_of, is_traced_input
from jaxprune.program._layout import Layout, layout_of, restored, standard
from jaxprune.program._nested import nesting_of, split_scan
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
from jaxprune.program._program import Operation, Program, trace_program
from jaxprune.program._run import Executor, HookResult, Record, Step, run_operation
from jaxprune.program._sizes import is_symbolic, sized
from jaxprune.program._track import Tracked
from jaxprune.program._uses import uses, uses_of_program

__all__ = ["Operation", "Program", "uses"]
