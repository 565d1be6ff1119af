"""What running a function asks of a compressed leaf: one row per kind, registered by class.

The row without entries is that of a leaf which is made dense.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.program import Layout
from jaxprune.runtime._decoders import BlockDecoder

Factors = tuple[jax.Array | None, jax.Array | None] | str


class Kind(StrEnum):
    """What the codes of a leaf are in a product."""

    INTEGER = "integer"
    PACKED_INTEGER = "packed_integer"
    INTEGER_CODEWORD = "integer_codeword"
    GROUPED_INTEGER = "grouped_integer"
    NUMBER = "number"  # scales factor out, but products are no 8-bit ones
    NF4_LEVEL = "nf4_level"
    FEW_CODEWORDS = "few_codewords"
    MANY_CODEWORDS = "many_codewords"
    NM_VALUE = "nm_value"
    VALUE = "value"


INTEGERS = (Kind.INTEGER, Kind.PACKED_INTEGER, Kind.INTEGER_CODEWORD)


@dataclass(frozen=True)
class LeafRule:
    """How one kind of leaf is used.

    Attributes:
      decoder: how products read it block by block; `None`: it has no products of its own.
      factored_scales: `(w, layout)`: scales of the contracted indices and of the results, as stored,
        where scales of the codes are one or the other; else the reason why they do not factor out.
      kind: `(w, layout)`: the kind of its codes, and what keeps them from being integers.
      bound: `(w, axes)`: a bound of the absolute values along axes, which stay with size 1 (others may).
      zero_point: what is subtracted from codes, as stored, or `None`.
      take_rows: `(w, index)`: entries of the leading axis by a flat index, dense; `None`: no look-up.
      is_packed: whether the last axis lies several in a byte.
      in_product: what stands for it in a product.
      channel_codes: `(w, axis)`: int8 codes, and a scale for each entry of an axis, or `None`.
      product: `(x, w, layout, run)`: a product of its own, or `None` where it is read another way.
      convolution: `(operation, x, held)`: a convolution of its own, or the reason why not.
    """

    decoder: Callable[[Any], BlockDecoder] | None = None
    factored_scales: Callable[[Any, Layout], Factors] = lambda w, layout: "scales do not factor out"
    kind: Callable[[Any, Layout], tuple[Kind, str]] = lambda w, layout: (Kind.VALUE, "")
    bound: Callable[[Any, tuple[int, ...]], jax.Array] = lambda w, axes: jnp.max(
        jnp.abs(w.materialize().astype(jnp.float32)), axes, keepdims=True, initial=0.0
    )
    zero_point: Callable[[Any], jax.Array | None] = lambda w: None
    take_rows: Callable[[Any, jax.Array], jax.Array] | None = None
    is_packed: Callable[[Any], bool] = lambda w: False
    in_product: Callable[[Any], Any] = lambda w: w
    channel_codes: Callable[[Any, int], tuple[jax.Array, jax.Array] | None] = lambda w, axis: None
    product: Callable[..., jax.Array | None] | None = None
    convolution: Callable[..., jax.Array | str] | None = None


DENSE = LeafRule()
_RULES: dict[type, Callable[[Any], LeafRule]] = {}


def register_leaf(cls: type, rule: LeafRule | Callable[[Any], LeafRule]) -> None:
    """Say how functions on compressed leaves use a class of them.

    Args:
      cls: a registered dataclass with `shape`, `dtype` and `materialize()`.
      rule: its rule, or `leaf -> LeafRule`; what it leaves out is done on the dense leaf.

    Returns:
      Nothing: the last rule of a class counts.

    Example:
      >>> Constant = type("Constant", (), {})
      >>> jp.runtime.register_leaf(Constant, jp.runtime.LeafRule())  # dense wherever it is used
    """
    _RULES[cls] = (lambda _, rule=rule: rule) if isinstance(rule, LeafRule) else rule


def rule_of(array: Any) -> LeafRule:
    """The rule of a leaf; that of a leaf which is made dense for those without."""
    found = _RULES.get(type(array))
    return DENSE if found is None else found(array)


def has_rule(array: Any) -> bool:
    """Whether a leaf has products of its own."""
    return rule_of(array).decoder is not None
