"""Ways to multiply by a quantized or clustered array.

Each takes `x` of shape (batch…, rows, contracted…), the array and the layout of the product, and gives
(batch…, rows, free…) in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.program import Layout, sized
from jaxprune.quantize import InputScale, Levels, QuantizedArray
from jaxprune.runtime._activations import (
    STEPS,
    How,
    Planes,
    in_planes,
    rounded,
    row_scale,
    with_known_scale,
)
from jaxprune.runtime._readers import Part, integer_book, largest, scale_of_integers
from jaxprune.runtime._sweep import sweep
from jaxprune.share import ClusteredArray
from jaxprune.sparse import SparseArray

Compressed = QuantizedArray | ClusteredArray | SparseArray
_FEW = 2  # integer products of fewer rows run slower than of these


def separated(w: Compressed, layout: Layout) -> tuple[Array | None, Array | None] | str:
    """Scales of the contracted indices and of the results, as stored, where the scales of the codes are
    one or the other; else the reason why they do not factor out of the product.
    """
    if isinstance(w, SparseArray):
        return "what is left of pruned weights are any numbers"
    if isinstance(w, ClusteredArray):
        if integer_book(w) is None:
            return "codewords are any numbers"
        return None, scale_of_integers(w).astype(jnp.float32)
    shape = w.scale.shape
    if any(n not in (1, m) for n, m in zip(shape, w.shape, strict=True)):
        return "scales differ within groups"
    scale = w.scale.astype(jnp.float32)
    if all(shape[i] == 1 for i in layout.contract):
        return None, scale
    if all(shape[i] == 1 for i in (*layout.free, *layout.batch)):
        return scale, None
    return "scales differ along contracted and other axes together"


def two_planes(x: Array, w: Compressed, layout: Layout, how: How) -> Array:
    """Activations as the sum of two 8-bit planes, 15 bits and a sign: two integer products in one."""
    inner, _ = _factors(w, layout)
    axes = _contracted(x, layout)
    x = _times_inner(rounded(x, axes, how), inner, layout)
    return _integer(in_planes(x, axes, 2), w, layout)


def integer(x: Array, w: Compressed, layout: Layout, how: How) -> Array:
    """Activations in 8 bits, by their known scale or one scale for each row, and an integer product."""
    inner, _ = _factors(w, layout)
    if isinstance(how, InputScale):
        assert inner is None, "a known scale does not factor out"
        return _integer(with_known_scale(x, how), w, layout)
    axes = _contracted(x, layout)
    return _integer(in_planes(_times_inner(x, inner, layout), axes, 1), w, layout)


def _integer(planes: Planes, w: Compressed, layout: Layout) -> Array:
    _, outer = _factors(w, layout)
    shape = planes.codes[0].shape[1:]
    rows = len(layout.batch)
    multiply = lambda xs, part, _: [layout.of(part.codes).dot(x, part.codes, jnp.int32) for x in xs]
    codes = [_padded(x, rows + 1) for x in planes.codes]
    y = _added(sweep(codes, w, None, layout, multiply), len(layout.batch), layout.rows)
    if planes.zero is not None:
        ones = jnp.ones((1, *shape[:rows], _FEW, *shape[rows + 1 :]), jnp.int8)
        sums = _added(sweep([ones], w, None, layout, multiply), len(layout.batch), 1)
        y = y - sums * planes.zero
    zero = _zero_of(w)
    if zero is not None:
        y = y - _offset(_value(planes), zero, layout)
    y = y * _over_free(planes.scale, layout)
    return y if outer is None else y * _beside(outer, layout)


def converted(x: Array, w: Compressed, layout: Layout, how: How) -> Array:
    """Codes converted to floats, a float product, and scales applied to its result."""
    inner, outer = _factors(w, layout)
    x = rounded(x, _contracted(x, layout), how)
    x = _times_inner(x, inner, layout)
    kind = jnp.promote_types(w.dtype, jnp.bfloat16)
    multiply = lambda xs, part, _: [
        layout.of(part.codes).dot(x.astype(kind), part.codes.astype(kind), jnp.float32) for x in xs
    ]
    y = sweep([x[None]], w, None, layout, multiply, block=None, bits=False)
    y = _added(y, len(layout.batch), layout.rows)
    zero = _zero_of(w)
    if zero is not None:
        y = y - _offset(x, zero, layout)
    return y if outer is None else y * _beside(outer, layout)


def float8(x: Array, w: QuantizedArray, layout: Layout, how: How) -> Array:
    """Both operands in float8, for hardware that multiplies them."""
    _, outer = _factors(w, layout)
    axes = _contracted(x, layout)
    scale = row_scale(x, axes, float(jnp.finfo(jnp.float8_e4m3fn).max))
    codes = (x / scale).astype(jnp.float8_e4m3fn)
    multiply = lambda xs, part, _: [
        layout.of(part.codes).dot(x, part.codes, jnp.float32) for x in xs
    ]
    y = sweep([codes[None]], w, None, layout, multiply, block=None, bits=False)
    y = _added(y, len(layout.batch), layout.rows) * _over_free(scale, layout)
    return y if outer is None else y * _beside(outer, layout)


def groups(x: Array, w: QuantizedArray, layout: Layout, how: How) -> Array:
    """Integer products group by group of one scale, activations in two planes, added as floats."""
    axes = _contracted(x, layout)
    planes = in_planes(rounded(x, axes, how), axes, 2)

    def product(x: Array, part: Levels) -> Array:
        y = layout.of(part.codes).dot(x, part.codes, jnp.int32).astype(jnp.float32)
        if part.zero_point is not None:
            sums = jnp.sum(x.astype(jnp.float32), -1, keepdims=True)
            y = y - sums * part.zero_point.astype(jnp.float32)
        return y * part.scale.astype(jnp.float32)

    multiply = lambda xs, part, _: [product(x, part.levels) for x in xs]
    codes = [_padded(x, 1) for x in planes.codes]
    y = sweep(codes, w, None, layout, multiply, block=w.size // w.scale.shape[0])
    return _added(y, 0, layout.rows) * _over_free(planes.scale, layout)


def blocks(x: Array, w: Compressed, layout: Layout, how: How) -> Array:
    """Block by block made dense, in a processor's cache, and a float product."""
    x = rounded(x, _contracted(x, layout), how)
    factors = separated(w, layout)
    if isinstance(factors, str) or _zero_of(w) is not None:
        multiply = lambda xs, part, _: [
            layout.of(part.codes).dot(x, part.values(), jnp.float32) for x in xs
        ]
        return _added(sweep([x[None]], w, None, layout, multiply), len(layout.batch), layout.rows)
    inner, outer = factors
    one = jnp.ones((1,) * w.ndim, jnp.float32)
    multiply = lambda xs, part, _: [
        layout.of(part.codes).dot(x, part.levels._replace(scale=one).values(), jnp.float32)
        for x in xs
    ]
    x = _times_inner(x, inner, layout)
    y = _added(sweep([x[None]], w, None, layout, multiply), len(layout.batch), layout.rows)
    return y if outer is None else y * _beside(outer, layout)


def block_planes(x: Array, w: Compressed, layout: Layout, how: How) -> Array:
    """Block by block made dense and rounded to two 8-bit planes, and three integer products with the
    activations in two: float precision of about 4 digits at the speed of integer products.
    """
    axes = _contracted(x, layout)
    planes = in_planes(rounded(x, axes, how), axes, 2)
    bound = largest(w, layout.contract)
    bound = jnp.where(bound == 0, 1.0, bound)
    factors = separated(w, layout)
    levels = isinstance(w, QuantizedArray) and w.spec.format == "nf4"
    by_level = levels and not isinstance(factors, str) and factors[0] is None
    extra = None if by_level else bound

    def multiply(xs: list[Array], part: Part, bound: Array | None) -> list[Array]:
        first, second = part.planes(bound)
        inner, at = layout.of(part.codes), len(layout.batch)
        high = [inner.dot(x, first, jnp.int32) for x in xs]
        some = xs[0] if sized(layout.rows) < _FEW else xs[0][:1]
        low = inner.dot(some, second, jnp.int32).astype(jnp.float32)
        low = jax.lax.slice_in_dim(low, 0, 1, axis=at)
        return [_sum_of_planes(high, at, low)]

    y = _added(sweep(planes.codes, w, extra, layout, multiply), len(layout.batch), layout.rows)
    return y * _over_free(planes.scale, layout) * _beside(bound / 127.0, layout)


def dense(x: Array, w: Compressed, layout: Layout, how: How) -> Array:
    """The whole array made dense: what the other ways compute, and what their derivatives are."""
    x = rounded(x, _contracted(x, layout), how)
    y = layout.dot(x[None], w.materialize().astype(jnp.float32), jnp.float32)
    return _added([y], len(layout.batch), layout.rows)


def _zero_of(w: Compressed) -> Array | None:
    zero = w.zero_point if isinstance(w, QuantizedArray) else None
    return None if zero is None else zero.astype(jnp.float32)


def _factors(w: Compressed, layout: Layout) -> tuple[Array | None, Array | None]:
    found = separated(w, layout)
    assert not isinstance(found, str), found
    return found


def _contracted(x: Array, layout: Layout) -> tuple[int, ...]:
    return tuple(range(x.ndim - len(layout.contract), x.ndim))


def _beside(scale: Array, layout: Layout) -> Array:
    """A scale of some free and batch axes, as stored, beside (batch…, rows, free…)."""
    kept = (*layout.batch, *layout.free)
    scale = jnp.transpose(scale, (*kept, *layout.contract))
    return jnp.expand_dims(scale.reshape(scale.shape[: len(kept)]), len(layout.batch))


def _over_free(scale: Array, layout: Layout) -> Array:
    """A scale of each row, (batch…, rows, 1…), or of all, beside (batch…, rows, free…)."""
    if scale.ndim == 0:
        return scale
    return scale.reshape(*scale.shape[: len(layout.batch) + 1], *(1 for _ in layout.free))


def _times_inner(x: Array, scale: Array | None, layout: Layout) -> Array:
    """`x` times a scale of some contracted axes, as stored."""
    if scale is None:
        return x
    kept = len(layout.batch) + len(layout.free)
    scale = jnp.transpose(scale, (*layout.batch, *layout.free, *layout.contract))
    return x * scale.reshape(scale.shape[kept:])


def _offset(x: Array, zero: Array, layout: Layout) -> Array:
    """What zero points of contracted or of other axes add to each result."""
    axes = _contracted(x, layout)
    if all(zero.shape[i] == 1 for i in layout.contract):
        return _over_free(jnp.sum(x, axes, keepdims=True), layout) * _beside(zero, layout)
    return _over_free(jnp.sum(_times_inner(x, zero, layout), axes, keepdims=True), layout)


def _value(planes: Planes) -> Array:
    """Activations in units of their scale."""
    found = _sum_of_planes(planes.codes, 0)[0]
    return found if planes.zero is None else found - planes.zero


def _padded(codes: Array, axis: int) -> Array:
    """At least two rows in all."""
    missing = max(-(-_FEW // len(codes)) - sized(codes.shape[axis]), 0)
    return jnp.pad(codes, [(0, missing if i == axis else 0) for i in range(codes.ndim)])


def _sum_of_planes(ys: list[Array], axis: int, more: Array | None = None) -> Array:
    """The first plane, and the second (and `more`) in its smaller unit; the axis of planes stays."""
    planes = [
        jax.lax.slice_in_dim(y, i, i + 1, axis=axis).astype(jnp.float32)
        for y in ys
        for i in range(y.shape[axis])
    ]
    rest = [*planes[1:], *([] if more is None else [more])]
    return planes[0] + sum(rest[1:], start=rest[0]) / STEPS if rest else planes[0]


def _added(ys: list[Array], n_batch: int, rows: int) -> Array:
    """Planes added, and padding cut: (batch…, planes, rows, free…) to (batch…, rows, free…)."""
    ys = [jax.lax.slice_in_dim(y, 0, rows, axis=n_batch + 1) for y in ys]
    return jax.lax.squeeze(_sum_of_planes(ys, n_batch), (n_batch,))
