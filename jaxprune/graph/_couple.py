"""The table of rules: how the ids of an operation's results follow from those of its operands.

A rule gets the operation's parameters and the `AxisInfo` of its operands, states constraints, and
returns the `AxisInfo` of its results. `zero` says of each index that the value there is exactly zero
once its unit is masked: the condition under which a sum does not notice the unit's removal. A primitive
without a rule freezes what it touches.
"""

from jaxprune.graph._axes import Rule
from jaxprune.graph._elementwise import elementwise
from jaxprune.graph._indexing import (
    dynamic_slice_rule,
    dynamic_update_rule,
    fft_rule,
    gather_rule,
    leading_rule,
    scatter_rule,
    top_k_rule,
)
from jaxprune.graph._mixing import (
    along_rule,
    collective_rule,
    conv_rule,
    dot_rule,
    ragged_rule,
    reduce_rule,
    window_rule,
)
from jaxprune.graph._shapes import (
    bitcast_rule,
    broadcast_rule,
    concatenate_rule,
    generated_rule,
    pad_rule,
    reshape_rule,
    reverse_rule,
    slice_rule,
    split_op_rule,
    squeeze_rule,
    stack_rule,
    tile_rule,
    transpose_rule,
    unstack_rule,
)
from jaxprune.program import PRIMITIVES, Kind

RULES: dict[str, Rule] = {
    **{
        name: elementwise(name)
        for name, known in PRIMITIVES.items()
        if known.kind in (Kind.IDENTITY, Kind.CAST, Kind.ELEMENTWISE)
    },
    **{name: collective_rule(name) for name, x in PRIMITIVES.items() if x.kind is Kind.COLLECTIVE},
    **{name: reduce_rule(name) for name, x in PRIMITIVES.items() if x.kind is Kind.REDUCTION},
    "broadcast_in_dim": broadcast_rule,
    "transpose": transpose_rule,
    "squeeze": squeeze_rule,
    "expand_dims": reshape_rule,
    "reshape": reshape_rule,
    "concatenate": concatenate_rule,
    "slice": slice_rule,
    "split": split_op_rule,
    "pad": pad_rule,
    "dot_general": dot_rule,
    "ragged_dot": ragged_rule,
    "ragged_dot_general": ragged_rule,
    "conv_general_dilated": conv_rule,
    "reduce_window_max": window_rule,
    "reduce_window_min": window_rule,
    "reduce_window_sum": window_rule,
    "select_and_scatter_add": window_rule,
    "select_and_gather_add": window_rule,
    "gather": gather_rule,
    **{name: scatter_rule(name) for name, x in PRIMITIVES.items() if x.kind is Kind.UPDATE},
    "fft": fft_rule,
    "top_k": top_k_rule,
    "approx_top_k": top_k_rule,
    **{name: generated_rule for name, x in PRIMITIVES.items() if x.kind is Kind.GENERATED},
    **{
        name: leading_rule(name, last)
        for name, last in {
            "cholesky": 2,
            "lu": 2,
            "qr": 2,
            "householder_product": 2,
            "triangular_solve": 2,
            "eigh": 2,
            "eig": 2,
            "svd": 2,
            "schur": 2,
            "hessenberg": 2,
            "tridiagonal": 2,
        }.items()
    },
    "stack": stack_rule,
    "unstack": unstack_rule,
    "tile": tile_rule,
    "dynamic_slice": dynamic_slice_rule,
    "dynamic_update_slice": dynamic_update_rule,
    "sort": along_rule("sort"),
    **{name: along_rule(name) for name, x in PRIMITIVES.items() if x.kind is Kind.CUMULATIVE},
    "rev": reverse_rule,
    "bitcast_convert_type": bitcast_rule,
}
"""The table: add a primitive here, and its counterpart in `_evaluate.RULES` if it names sizes."""
