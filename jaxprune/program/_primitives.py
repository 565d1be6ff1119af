"""One table of primitives: what an operation is, for whoever reads a program.

A name that the table lacks is `Kind.OTHER`, of which nothing is known: whoever reads it stops there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import jax.numpy as jnp


class Kind(StrEnum):
    """What a primitive does.

    IDENTITY: hands its operands on. CAST: the same numbers, rounded. VIEW: all entries of one operand
    under other axes. PART: some of them. JOIN: several operands, or padding, side by side. PRODUCT:
    sums of products of two operands. ELEMENTWISE: entry by entry. REDUCTION, CUMULATIVE, WINDOW: sums
    and the like, over axes, along one, of neighbours. REORDER: entries in another order. LOOKUP, UPDATE:
    reads and writes by computed index. COLLECTIVE: exchange between devices. GENERATED: made from
    nothing. NESTED: runs programs of its own. OPENED: `trace_program` puts its operations in its place.
    """

    IDENTITY = "identity"
    CAST = "cast"
    VIEW = "view"
    PART = "part"
    JOIN = "join"
    PRODUCT = "product"
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    CUMULATIVE = "cumulative"
    WINDOW = "window"
    REORDER = "reorder"
    LOOKUP = "lookup"
    UPDATE = "update"
    COLLECTIVE = "collective"
    GENERATED = "generated"
    NESTED = "nested"
    OPENED = "opened"
    OTHER = "other"


@dataclass(frozen=True)
class Primitive:
    """What is known of a primitive.

    Attributes:
      kind: what it does.
      is_free: it moves or makes numbers and computes none.
      is_transcendental: it computes, but no floating-point operations are counted, as in XLA.
      is_exponential: it is one, as in a softmax or a sigmoid.
      preserves_zero: the result is zero where all operands are.
      absorbs_zero: the result is zero where any operand is.
      neutral: the right operand that leaves the left one as it is; the left one too, if it commutes.
      commutes: operands may change places.
      programs: names of the parameters that hold its inner programs.
    """

    kind: Kind
    is_free: bool = False
    is_transcendental: bool = False
    is_exponential: bool = False
    preserves_zero: bool = False
    absorbs_zero: bool = False
    neutral: int | None = None
    commutes: bool = False
    programs: tuple[str, ...] = ()


def _rows(names: str, kind: Kind, **known: Any) -> dict[str, Primitive]:
    return dict.fromkeys(names.split(), Primitive(kind, **known))


_OTHER = Primitive(Kind.OTHER)
_ELEMENTWISE = Kind.ELEMENTWISE

PRIMITIVES: Mapping[str, Primitive] = {
    **_rows(
        "copy copy_p optimization_barrier name stop_gradient device_put sharding_constraint "
        "layout_constraint mesh_cast reshard pvary pcast",
        Kind.IDENTITY,
        is_free=True,
        preserves_zero=True,
    ),
    **_rows("convert_element_type reduce_precision", Kind.CAST, is_free=True, preserves_zero=True),
    **_rows(
        "reshape transpose squeeze expand_dims broadcast_in_dim",
        Kind.VIEW,
        is_free=True,
        preserves_zero=True,
    ),
    **_rows("slice dynamic_slice split unstack", Kind.PART, is_free=True),
    **_rows("concatenate stack pad tile", Kind.JOIN, is_free=True),
    **_rows("dot_general conv_general_dilated ragged_dot ragged_dot_general", Kind.PRODUCT),
    **_rows("abs ceil floor integer_pow neg round sign square", _ELEMENTWISE, preserves_zero=True),
    **_rows("conj imag real", _ELEMENTWISE, is_free=True, preserves_zero=True),
    **_rows(
        "asin asinh atan atanh cbrt erf erf_inv expm1 log1p sin sinh sqrt tan tanh",
        _ELEMENTWISE,
        is_transcendental=True,
        preserves_zero=True,
    ),
    **_rows(
        "acos acosh bessel_i0e bessel_i1e cos cosh digamma erfc lgamma log rsqrt",
        _ELEMENTWISE,
        is_transcendental=True,
    ),
    **_rows("exp exp2 logistic", _ELEMENTWISE, is_transcendental=True, is_exponential=True),
    **_rows("clz is_finite not one_minus_square population_count", _ELEMENTWISE),
    **_rows("add add_any or xor", _ELEMENTWISE, preserves_zero=True, neutral=0, commutes=True),
    **_rows("sub", _ELEMENTWISE, preserves_zero=True, neutral=0),
    **_rows("max min", _ELEMENTWISE, preserves_zero=True, commutes=True),
    **_rows("nextafter clamp", _ELEMENTWISE, preserves_zero=True),
    **_rows("select_n", _ELEMENTWISE, is_free=True, preserves_zero=True),
    **_rows("mul", _ELEMENTWISE, preserves_zero=True, absorbs_zero=True, neutral=1, commutes=True),
    **_rows("and", _ELEMENTWISE, preserves_zero=True, absorbs_zero=True, commutes=True),
    **_rows("div", _ELEMENTWISE, neutral=1),
    **_rows(
        "rem pow atan2 eq ne lt le gt ge eq_to le_to lt_to shift_left shift_right_logical "
        "shift_right_arithmetic complex polygamma zeta igamma igammac igamma_grad_a "
        "random_gamma_grad regularized_incomplete_beta",
        _ELEMENTWISE,
    ),
    **_rows(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin",
        Kind.REDUCTION,
    ),
    **_rows("cumsum cumprod cummax cummin cumlogsumexp", Kind.CUMULATIVE),
    **_rows(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add "
        "select_and_gather_add",
        Kind.WINDOW,
    ),
    **_rows("rev", Kind.REORDER, is_free=True),
    **_rows("sort top_k approx_top_k", Kind.REORDER),
    **_rows("gather", Kind.LOOKUP, is_free=True),
    **_rows("scatter dynamic_update_slice", Kind.UPDATE, is_free=True),
    **_rows(
        "scatter-add scatter_add scatter-sub scatter_sub scatter-mul scatter_mul scatter-min scatter_min "
        "scatter-max scatter_max",
        Kind.UPDATE,
    ),
    **_rows(
        "psum psum_invariant pmax pmin ppermute",
        Kind.COLLECTIVE,
        is_free=True,
        preserves_zero=True,
    ),
    **_rows("iota random_bits rng_uniform empty2", Kind.GENERATED, is_free=True),
    # links between a nested operation and its programs, see `Flow`
    "enter": Primitive(Kind.IDENTITY, is_free=True, preserves_zero=True),
    "iterate": Primitive(Kind.VIEW, is_free=True, preserves_zero=True),
    "scan": Primitive(Kind.NESTED, programs=("jaxpr",)),
    "while": Primitive(Kind.NESTED, programs=("cond_jaxpr", "body_jaxpr")),
    "cond": Primitive(Kind.NESTED, programs=("branches",)),
    "shard_map": Primitive(Kind.NESTED, programs=("jaxpr",)),
    "custom_vjp_call": Primitive(Kind.NESTED, programs=("call_jaxpr",)),
    **_rows("jit pjit remat remat2 checkpoint", Kind.OPENED, programs=("jaxpr",)),
    **_rows("closed_call core_call custom_jvp_call", Kind.OPENED, programs=("call_jaxpr",)),
}
"""Every primitive that some rule knows, by name; names differ between JAX versions."""


def primitive(name: str) -> Primitive:
    """What is known of a primitive; `Kind.OTHER` where nothing is."""
    return PRIMITIVES.get(name, _OTHER)


def is_identity(name: str) -> bool:
    """Whether it hands its operands on, one result for each."""
    return primitive(name).kind is Kind.IDENTITY


def is_view(name: str) -> bool:
    """Whether its result has all entries of its operand, under other axes."""
    return primitive(name).kind is Kind.VIEW


def is_product(name: str) -> bool:
    """Whether it sums products of two operands: a matrix product or a convolution."""
    return primitive(name).kind is Kind.PRODUCT


def is_elementwise(name: str) -> bool:
    """Whether it computes entry by entry."""
    return primitive(name).kind is Kind.ELEMENTWISE


def same_numbers(operation: Any, *, views: bool = False) -> bool:
    """Whether the result of an operation has the numbers of its operand, up to rounding.

    Identities and casts to floats do; a cast to integers cuts. `views`: so do views.
    """
    kind = primitive(operation.primitive.name).kind
    if kind is Kind.CAST:
        kept = operation.params.get("new_dtype", jnp.float32)
        return bool(jnp.issubdtype(kept, jnp.inexact))
    return kind is Kind.IDENTITY or (views and kind is Kind.VIEW)


def root(makers: Mapping[int, Any], number: int, *, views: bool = False) -> int:
    """The value that another is, under other names: identities and casts stripped.

    Args:
      makers: the operation that makes each value.
      number: of the value.
      views: strip views too: what it is apart from its axes.
    """
    while (maker := makers.get(number)) is not None and same_numbers(maker, views=views):
        number = maker.ins[maker.outs.index(number)]
    return number
