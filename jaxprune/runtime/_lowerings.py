"""Ways to multiply by a compressed array.

Each takes `x` of shape (batch…, rows, contracted…), the array and the layout of the product, and gives
(batch…, rows, free…) in float32. What is rounded on the way is off by at most 5e-4 of the root mean
square of the results; where `x` or the weights hold outliers that make that impossible, or values that
are not finite, the product is one of floats, decided as it runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune._trees import is_few
from jaxprune.program import Layout
from jaxprune.quantize import InputScale, Levels
from jaxprune.runtime._activations import (
    STEPS,
    TOP,
    How,
    Int8Split,
    all_mapped,
    excess,
    int8_split,
    is_even,
    is_resolved,
    reaches,
    rounded,
    row_scale,
    with_known_scale,
)
from jaxprune.runtime._barrier import barrier
from jaxprune.runtime._blocked import BLOCK, FEW_ROWS, FEW_ROWS_BLOCK, PADS_ROWS, blocked_product
from jaxprune.runtime._decoders import Block
from jaxprune.runtime._derivatives import differentiated
from jaxprune.runtime._integers import LONGEST
from jaxprune.runtime._operands import (
    added,
    beside,
    contracted,
    over_free,
    sum_of_parts,
    times_inner,
)
from jaxprune.runtime._rules import INTEGERS, Kind, has_rule, rule_of
from jaxprune.runtime._samples import mean_squares, sampled, weights_resolved

_FEW = 2  # integer products of fewer rows run slower than of these
_PEAK = 5.0  # largest to rms of a column of weights, as a rule


class Lowering(NamedTuple):
    """A way to multiply.

    Attributes:
      run: `(x, w, layout, how) -> y`.
      fits: `(w, layout)`: whether it can.
      why: the reason to take it.
      otherwise: what is taken where it does not fit.
      is_apart: computed apart from what is around it, as a dense product is; compilers fuse the others.
    """

    run: Callable[[Array, Any, Layout, How], Array]
    fits: Callable[[Any, Layout], bool]
    why: str
    otherwise: str = "dense"
    is_apart: bool = True


def _split(x: Array, w: Any, layout: Layout, how: How) -> Array:
    """Activations as the sum of two int8 parts, 15 bits and a sign: two integer products in one."""
    inner, _ = _factors(w, layout)
    axes = contracted(x, layout)
    x = rounded(x, axes, how)
    scaled = times_inner(x, inner, layout)

    def fast() -> tuple[Array, Array]:
        y, seen = _in_codes(int8_split(scaled, axes, 2), w, layout)
        return _scaled(y, w, layout), reaches(y, scaled, mean_squares(seen, layout))

    return _guarded(scaled, axes, fast, lambda: _blocked(x, w, layout, None))


def _guarded(
    x: Array,
    axes: tuple[int, ...],
    fast: Callable[[], tuple[Array, Array]],
    slow: Callable[[], Array],
    of_weights: float = 0.0,
) -> Array:
    """`fast()` where two int8 parts resolve `x`, `fast` says so of the weights, and the results are even
    enough for errors to be small beside all of them; else `slow()`. Decided as the program runs.
    `of_weights`: the ratio of largest to rms that weights have, where they are rounded too.
    """
    resolved, peak = is_resolved(x, axes)
    peak = jnp.hypot(peak, of_weights)
    shape = jax.eval_shape(fast)[0]

    def checked() -> tuple[Array, Array]:
        y, fine = fast()
        return y, fine & is_even(y, peak)

    nothing = lambda: (jnp.zeros(shape.shape, shape.dtype), jnp.array(False))
    y, fine = jax.lax.cond(resolved, checked, nothing)
    return jax.lax.cond(all_mapped(fine), lambda: y, slow)


def _integer(x: Array, w: Any, layout: Layout, how: How) -> Array:
    """Activations in 8 bits, by their known scale or one scale for each row, and an integer product."""
    inner, _ = _factors(w, layout)
    axes = contracted(x, layout)
    if isinstance(how, InputScale):
        assert inner is None, "a known scale does not factor out"
        fast = lambda: _integer_product(with_known_scale(x, how), w, layout)
    else:
        fast = lambda: _integer_product(
            int8_split(times_inner(x, inner, layout), axes, 1), w, layout
        )
    is_finite = all_mapped(jnp.isfinite(jnp.sum(0.0 * x)))
    return jax.lax.cond(is_finite, fast, lambda: _blocked(x, w, layout, how))


def _integer_product(split: Int8Split, w: Any, layout: Layout) -> Array:
    return _scaled(_in_codes(split, w, layout)[0], w, layout)


def _scaled(y: Array, w: Any, layout: Layout) -> Array:
    """Results times the scales of output channels."""
    _, outer = _factors(w, layout)
    return y if outer is None else y * beside(outer, layout)


def _in_codes(split: Int8Split, w: Any, layout: Layout) -> tuple[Array, Array]:
    """An integer product in units of codes of the weights, and some squares of those, see `sampled`."""
    shape = split.codes[0].shape[1:]
    at = len(layout.batch)

    def multiply(xs: list[Array], part: Block, _: Any) -> list[Array]:
        inner = layout.of(part.codes)
        found = [inner.dot(x, part.codes, jnp.int32) for x in xs]
        return [*found, sampled([part.codes], inner, jnp.square)]

    codes = [_padded(x, at + 1) for x in split.codes]
    *ys, seen = blocked_product(codes, w, None, layout, multiply)
    y = added(ys, at, layout.rows)
    if split.zero is not None:
        ones = jnp.ones((1, *shape[:at], _FEW, *shape[at + 1 :]), jnp.int8)
        sums = added(blocked_product([ones], w, None, layout, multiply)[:-1], at, 1)
        y = y - sums * split.zero
    zero = rule_of(w).zero_point(w)
    if zero is not None:
        y = y - _offset(_value(split), zero, layout)
    return y * over_free(split.scale, layout), seen


def _converted(x: Array, w: Any, layout: Layout, how: How) -> Array:
    """Codes converted to floats, a float product, and scales applied to its result."""
    inner, outer = _factors(w, layout)
    x = rounded(x, contracted(x, layout), how)
    x = times_inner(x, inner, layout)
    kind = jnp.promote_types(x.dtype, jnp.bfloat16)
    multiply = lambda xs, part, _: [
        layout.of(part.codes).dot(x.astype(kind), _numbers(part).astype(kind), jnp.float32)
        for x in xs
    ]
    y = blocked_product([x[None]], w, None, layout, multiply, block=None)
    y = added(y, len(layout.batch), layout.rows)
    zero = rule_of(w).zero_point(w)
    if zero is not None:
        y = y - _offset(x.astype(jnp.float32), zero, layout)
    return y if outer is None else y * beside(outer, layout)


def _numbers(part: Block) -> Array:
    """Codes as numbers: float8 ones, which blocks hold as their bits, too."""
    bits = part.codes.dtype == jnp.uint8
    return jax.lax.bitcast_convert_type(part.codes, jnp.float8_e4m3fn) if bits else part.codes


def _float8(x: Array, w: Any, layout: Layout, how: How) -> Array:
    """Both operands in float8, for hardware that multiplies them."""
    _, outer = _factors(w, layout)
    axes = contracted(x, layout)
    scale = row_scale(x, axes, float(jnp.finfo(jnp.float8_e4m3fn).max))
    codes = (x / scale).astype(jnp.float8_e4m3fn)
    multiply = lambda xs, part, _: [
        layout.of(part.codes).dot(x, _numbers(part), jnp.float32) for x in xs
    ]
    y = blocked_product([codes[None]], w, None, layout, multiply, block=None)
    y = added(y, len(layout.batch), layout.rows) * over_free(scale, layout)
    return y if outer is None else y * beside(outer, layout)


def _groups(x: Array, w: Any, layout: Layout, how: How) -> Array:
    """Integer products group by group of one scale, activations in two int8 parts, added as floats."""
    axes = contracted(x, layout)
    x = rounded(x, axes, how)

    def product(x: Array, part: Levels) -> Array:
        y = layout.of(part.codes).dot(x, part.codes, jnp.int32).astype(jnp.float32)
        if part.zero_point is not None:
            sums = jnp.sum(x.astype(jnp.float32), -1, keepdims=True)
            y = y - sums * part.zero_point.astype(jnp.float32)
        return y * part.scale.astype(jnp.float32)

    def fast() -> tuple[Array, Array]:
        split = int8_split(x, axes, 2)

        def multiply(xs: list[Array], part: Any, _: Any) -> list[Array]:
            scale = part.levels.scale.astype(jnp.float32)
            squares = lambda codes: jnp.square(codes * scale)
            seen = sampled([part.codes], layout.of(part.codes), squares)
            return [*(product(x, part.levels) for x in xs), seen]

        codes = [_padded(x, 1) for x in split.codes]
        block = w.size // w.scale.shape[0]
        *ys, seen = blocked_product(codes, w, None, layout, multiply, block=block)
        y = added(ys, 0, layout.rows) * over_free(split.scale, layout)
        return y, reaches(y, x, mean_squares(seen, layout))

    return _guarded(x, axes, fast, lambda: _blocked(x, w, layout, None))


def _blocked(x: Array, w: Any, layout: Layout, how: How) -> Array:
    """Block by block made dense, in a processor's cache, and a float product."""
    x = rounded(x, contracted(x, layout), how)
    rule = rule_of(w)
    factors = rule.factored_scales(w, layout)
    if isinstance(factors, str) or rule.zero_point(w) is not None:
        inner, outer, of = None, None, lambda part: part.values()
    else:
        inner, outer = factors
        of = lambda part: part.unscaled()
    multiply = lambda xs, part, _: [layout.of(part.codes).dot(x, of(part), jnp.float32) for x in xs]
    at = len(layout.batch)
    x = times_inner(x, inner, layout)
    x = _padded(x[None], at + 1) if PADS_ROWS else x[None]
    block = FEW_ROWS_BLOCK if is_few(layout.rows, FEW_ROWS) else BLOCK
    y = blocked_product([x], w, None, layout, multiply, block=block)
    y = added(y, at, layout.rows)
    return y if outer is None else y * beside(outer, layout)


def _blocked_split(x: Array, w: Any, layout: Layout, how: How) -> Array:
    """Block by block made dense and split into two int8 parts, and four integer products with the
    activations in two: the precision of floats to about 4 digits at the speed of integer products.
    """
    axes = contracted(x, layout)
    x = rounded(x, axes, how)
    fast = lambda: _both_split(x, w, layout)
    return _guarded(x, axes, fast, lambda: _blocked(x, w, layout, None), _PEAK)


def _both_split(x: Array, w: Any, layout: Layout) -> tuple[Array, Array]:
    """The product, and whether two int8 parts resolve the weights."""
    split = int8_split(x, contracted(x, layout), 2)
    rule, at = rule_of(w), len(layout.batch)
    bound = rule.bound(w, layout.contract)
    unit = jnp.where(bound == 0, 1.0, bound)
    kind, _ = rule.kind(w, layout)
    extra = None if kind == Kind.NF4_LEVEL else unit

    def multiply(xs: list[Array], part: Block, unit: Array | None) -> list[Array]:
        high, low = part.split(unit)
        inner = layout.of(part.codes)
        found = [_hi_lo_product(inner, x, high, low, at) for x in xs]
        seen = [sampled([high, low], inner, f) for f in (lambda x: excess(jnp.abs(x)), jnp.square)]
        return [*found, *seen]

    *ys, above, seen = blocked_product(split.codes, w, extra, layout, multiply)
    y = added(ys, at, layout.rows) * over_free(split.scale, layout)
    fine = reaches(y, x, mean_squares(seen, layout))
    if extra is not None:
        fine &= weights_resolved(above, bound, layout)
    return y * beside(unit / TOP, layout), fine


def _hi_lo_product(inner: Layout, x: Array, high: Array, low: Array, at: int) -> Array:
    """Products with both parts of the weights, in units of the high one; parts of `x` stay apart."""
    whole = inner.dot(x, high, jnp.int32).astype(jnp.float32)
    return whole + inner.dot(x, low, jnp.int32).astype(jnp.float32) / STEPS


def _dense(x: Array, w: Any, layout: Layout, how: How) -> Array:
    """The whole array made dense: what the other ways compute, and what their derivatives are."""
    x = rounded(x, contracted(x, layout), how)
    y = layout.dot(x[None], w.materialize().astype(jnp.float32), jnp.float32)
    return added([y], len(layout.batch), layout.rows)


def _kind(w: Any, layout: Layout) -> Kind:
    return rule_of(w).kind(w, layout)[0]


def _is_integer(w: Any, layout: Layout) -> bool:
    return _kind(w, layout) in INTEGERS


def _is_float8(w: Any) -> bool:
    return getattr(getattr(w, "spec", None), "format", "") == "float8_e4m3fn"


LOWERINGS: dict[str, Lowering] = {
    "int8_split": Lowering(
        _split,
        _is_integer,
        "integer products are fastest, the activations in two int8 parts",
        "blocked",
    ),
    "integer": Lowering(_integer, _is_integer, "8-bit activations and codes", "blocked"),
    "converted": Lowering(
        _converted,
        lambda w, layout: _kind(w, layout) in (*INTEGERS, Kind.NUMBER),
        "the compiler fuses the conversion into the product",
        is_apart=False,
    ),
    "float8": Lowering(
        _float8,
        lambda w, layout: _kind(w, layout) == Kind.NUMBER and _is_float8(w),
        "both operands in float8, one scale per row",
        is_apart=False,
    ),
    "groups": Lowering(
        _groups,
        lambda w, layout: _kind(w, layout) == Kind.GROUPED_INTEGER,
        "few rows: integer products group by group",
        "blocked",
    ),
    "blocked": Lowering(
        _blocked,
        lambda w, layout: has_rule(w),
        "made dense block by block in the cache, and a float product",
    ),
    "blocked_int8_split": Lowering(
        _blocked_split,
        lambda w, layout: has_rule(w) and bool(layout.contract) and layout.depth <= LONGEST,
        "made dense block by block, and integer products of int8 parts",
        "blocked",
    ),
    "dense": Lowering(
        _dense,
        lambda w, layout: True,
        "the compiler fuses what makes it dense into the product",
        is_apart=False,
    ),
}
"""Ways to multiply, by name."""


@partial(jax.jit, static_argnums=(0, 3))
def run(name: str, x: Any, w: Any, layout: Layout, how: How) -> jax.Array:
    """A product by its lowering, `x` and result as the lowerings have them.

    Its derivative is that of the product with the dense array. Traced, and out of `jit` compiled, once
    for all leaves of a kind and shape: the branches within would be compiled anew for each.
    """
    lowering = LOWERINGS[name]
    around = barrier if lowering.is_apart else lambda x: x
    wide = lambda x: x if name == "converted" else x.astype(jnp.float32)
    compute = lambda x, w, how: around(lowering.run(around(wide(x)), w, layout, how))
    reference = lambda x, w, how: _dense(x.astype(jnp.float32), w, layout, how)
    return differentiated(compute, reference)(x, w, how)


def _factors(w: Any, layout: Layout) -> tuple[Array | None, Array | None]:
    found = rule_of(w).factored_scales(w, layout)
    assert not isinstance(found, str), found
    return found


def _offset(x: Array, zero: Array, layout: Layout) -> Array:
    """What zero points of contracted or of other axes add to each result."""
    axes = contracted(x, layout)
    if all(zero.shape[i] == 1 for i in layout.contract):
        return over_free(jnp.sum(x, axes, keepdims=True), layout) * beside(zero, layout)
    return over_free(jnp.sum(times_inner(x, zero, layout), axes, keepdims=True), layout)


def _value(split: Int8Split) -> Array:
    """Activations in units of their scale."""
    found = sum_of_parts(split.codes, 0)[0]
    return found if split.zero is None else found - split.zero


def _padded(codes: Array, axis: int) -> Array:
    """At least two rows in all."""
    rows, wanted = codes.shape[axis], -(-_FEW // len(codes))
    missing = max(wanted - rows, 0) if is_few(rows, wanted) else 0
    return jnp.pad(codes, [(0, missing if i == axis else 0) for i in range(codes.ndim)])
