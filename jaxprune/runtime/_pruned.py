"""Pruned arrays at work: what is left of every few neighbours."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxprune._trees import dense
from jaxprune._types import is_compressed
from jaxprune.program import Layout
from jaxprune.quantize import QuantizedArray, Spec
from jaxprune.runtime._activations import TOP, hi_lo
from jaxprune.runtime._barrier import barrier_all
from jaxprune.runtime._decoders import BlockDecoder, DenseBlock, dense_decoder
from jaxprune.runtime._rules import Kind, LeafRule, register_leaf, rule_of
from jaxprune.sparse import SparseArray


class NMBlock(DenseBlock):
    """What is left of pruned neighbours, in its places."""

    def split(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127`, in a high and a low int8 part.

        What is stored is rounded before it is spread: there is less of it, and bytes move faster.
        """
        assert bound is not None
        values = dense(self.array.values).astype(jnp.float32)
        high, low = barrier_all(hi_lo(values * (TOP / bound)), bound)
        return self.array.spread(high), self.array.spread(low)


def _decoder(w: SparseArray) -> BlockDecoder:
    whole = replace(w.opened(), values=jnp.asarray(dense(w.values)))
    groups = w.groups if w.axis == -w.ndim and w.length % w.m == 0 else 1
    found = dense_decoder(whole, groups, NMBlock)
    leading = lambda q, start, size: q.leading(start, size)
    return found._replace(leading=leading)


def as_quantized(w: SparseArray) -> Any:
    """A pruned leaf of integer codes as an array of codes, zeros between; itself where that cannot be."""
    values = w.values
    if not isinstance(values, QuantizedArray) or values.zero_point is not None:
        return w
    if not values.spec.format.startswith("int") or values.ndim != w.ndim:
        return w
    if values.spec.padded_axis is not None:
        return w
    shared, stored = values.scale.shape[w.axis], values.shape[w.axis]
    # groups of scales must be whole groups of neighbours
    if shared > 1 and (w.length % w.m or stored % shared or (stored // shared) % w.n):
        return w
    codes = w.spread(values.levels())
    return QuantizedArray.of_levels(codes, values.scale, None, Spec(bits=8), w.dtype)


def _kind(w: SparseArray, layout: Layout) -> tuple[Kind, str]:
    return Kind.NM_VALUE, ""


def _bound(w: SparseArray, axes: tuple[int, ...]) -> Array:
    values = jnp.abs(dense(w.values).astype(jnp.float32))
    along = {*axes, w.ndim + w.axis}  # one bound for all that is left along the groups
    return jnp.max(values, tuple(along), keepdims=True, initial=0.0)


def _take_rows(w: SparseArray, index: Array) -> Array:
    values = w.values
    taken = rule_of(values).take_rows if is_compressed(values) else None
    rows = taken(values, index) if taken else jnp.take(jnp.asarray(dense(values)), index, axis=0)
    return replace(w, values=rows, flags=jnp.take(w.flags, index, axis=0)).materialize()


RULE = LeafRule(
    decoder=_decoder, kind=_kind, bound=_bound, take_rows=_take_rows, in_product=as_quantized
)
# a row is spread over values of its neighbours where they lie along the leading axis
_LEADING = replace(RULE, take_rows=None)
register_leaf(SparseArray, lambda w: _LEADING if w.axis == -w.ndim else RULE)
