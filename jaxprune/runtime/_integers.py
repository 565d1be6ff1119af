"""Quantized arrays at work."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.program import Layout
from jaxprune.quantize import (
    NF4_LEVELS,
    Levels,
    QuantizedArray,
    largest_values,
    level_fields,
    spread,
)
from jaxprune.runtime._activations import TOP, hi_lo
from jaxprune.runtime._codebooks import CodebookBlock
from jaxprune.runtime._decoders import BlockDecoder, Packing
from jaxprune.runtime._rules import Factors, Kind, LeafRule, register_leaf

LONGEST = (2**31 - 1) // (127 * 128)  # products of 8-bit integers that 32 bits hold
_GROUP = 64  # a loop over smaller groups costs more than it saves


class IntegerBlock(NamedTuple):
    """Levels of a quantized array."""

    levels: Levels

    @property
    def codes(self) -> Array:
        """int8, or the bits of float8 as uint8."""
        return self.levels.codes

    def values(self) -> Array:
        """What they stand for, in float32."""
        return self.levels.values()

    def unscaled(self) -> Array:
        """The same with scales of 1."""
        one = jnp.ones((1,) * self.codes.ndim, jnp.float32)
        return self.levels._replace(scale=one).values()

    def split(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127`, in a high and a low int8 part.

        No bound: of nf4 codes in units of their scale / 127, looked up rounded.
        """
        if bound is None:
            levels = jnp.array(NF4_LEVELS).reshape(-1, *(1 for _ in self.codes.shape))
            return CodebookBlock(self.codes.astype(jnp.uint8), levels).split(None)
        return hi_lo(self.values() * (TOP / bound))


def _decoder(w: QuantizedArray) -> BlockDecoder:
    per = 8 // w.spec.width
    width = per * w.values.shape[-1] if w.ndim else 0
    packing = Packing(per, w.length, width)

    def block(q: QuantizedArray, codes: Array, place: int | None) -> IntegerBlock:
        def own(y: Array) -> Array:
            if place is None:
                return y
            if y.shape[-1] not in (1, w.length):  # groups along the axis whose places are apart
                y = spread(y, (*y.shape[:-1], w.length), q.spec)
            return packing.own(y, place)

        zero = None if q.zero_point is None else own(q.zero_point)
        return IntegerBlock(Levels(codes, own(q.scale), zero, q.spec))

    return BlockDecoder(
        w,
        w.scale.shape[0] if w.ndim else 1,
        packing,
        lambda q, start, size: q.leading(start, size),
        lambda q: [block(q, codes, i) for i, codes in enumerate(level_fields(q))],
        lambda q: block(q, q.levels(), None),
        group_length=w.group_length if w.ndim and w.spec.padded_axis == -w.ndim else None,
    )


def decoder_of_bits(w: QuantizedArray) -> BlockDecoder:
    """The same, float8 codes as their bits: loops over bits are faster than over float8."""
    if w.spec.format == "float8_e4m3fn":
        w = replace(w, values=jax.lax.bitcast_convert_type(w.values, jnp.uint8))
    return _decoder(w)


def _factored_scales(w: QuantizedArray, layout: Layout) -> Factors:
    shape = w.scale.shape
    if any(n not in (1, m) for n, m in zip(shape, w.shape, strict=True)):
        return "scales differ within groups"
    scale = w.scale.astype(jnp.float32)
    if all(shape[i] == 1 for i in layout.contract):
        return None, scale
    if all(shape[i] == 1 for i in (*layout.free, *layout.batch)):
        return scale, None
    return "scales differ along contracted and other axes together"


def _kind(w: QuantizedArray, layout: Layout) -> tuple[Kind, str]:
    factors, is_integer = _factored_scales(w, layout), w.spec.format.startswith("int")
    if isinstance(factors, str):
        along = w.ndim == 2 and layout.contract == (0,) and is_integer
        rest = all(n in (1, m) for n, m in zip(w.scale.shape[1:], w.shape[1:], strict=True))
        worth = along and rest and w.group_length >= _GROUP
        return (Kind.GROUPED_INTEGER if worth else Kind.VALUE), factors
    if w.spec.format == "nf4":
        kind = Kind.NF4_LEVEL if factors[0] is None else Kind.VALUE
        return kind, "nf4 codes are no integers"
    if not is_integer:
        return Kind.NUMBER, f"{w.spec.format} codes are no integers"
    if layout.depth > LONGEST:
        return Kind.NUMBER, f"an integer sum over {layout.depth} products may overflow"
    return (Kind.INTEGER if w.spec.width == 8 else Kind.PACKED_INTEGER), ""


def _zero_point(w: QuantizedArray) -> Array | None:
    return None if w.zero_point is None else w.zero_point.astype(jnp.float32)


def _channel_codes(w: QuantizedArray, axis: int) -> tuple[Array, Array] | None:
    """The codes, if they are integers with one scale for each entry of the axis, or for all."""
    if not w.spec.format.startswith("int") or w.zero_point is not None:
        return None
    shape, axis = w.scale.shape, axis % w.ndim
    alone = all(n == 1 for i, n in enumerate(shape) if i != axis)
    if not alone or shape[axis] not in (1, w.shape[axis]):
        return None
    return w.levels(), w.scale.astype(jnp.float32)


def _take_rows(w: QuantizedArray, index: Array) -> Array:
    n = w.shape[0]

    def take(x: Array) -> Array:
        # a scale for all, for each, or for each group; groups along axis -2 lie there again once a row
        # is a matrix of one row
        length = 1 if x.shape[0] == n else w.group_length
        return jnp.take(x, index // length, axis=0)[:, None]

    zero = None if w.zero_point is None else take(w.zero_point)
    rows = replace(w, values=take(w.values), scale=take(w.scale), zero_point=zero)
    return jax.vmap(lambda q: q.materialize())(rows)[:, 0]


def _rule(w: QuantizedArray) -> LeafRule:
    return RULE if w.axis == -1 or w.spec.width == 8 else _SHORT


RULE = LeafRule(
    decoder=decoder_of_bits,
    factored_scales=_factored_scales,
    kind=_kind,
    bound=largest_values,
    zero_point=_zero_point,
    take_rows=_take_rows,
    is_packed=lambda w: w.spec.width < 8,
    channel_codes=_channel_codes,
)
_SHORT = LeafRule(channel_codes=_channel_codes)  # packed along another axis, as few are
register_leaf(QuantizedArray, _rule)
