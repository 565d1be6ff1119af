"""Factorised leaves at work: products and convolutions in a row, the small one in the middle."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _trees
from jaxprune.program import Layout, Operation, Tracked, run_operation
from jaxprune.runtime._rules import LeafRule, register_leaf
from jaxprune.share import LowRankArray, TuckerArray

Product = Callable[[jax.Array, Any, Layout, bool], jax.Array]
"""`(x, factor, layout, is_first)`: a product with one factor, dense or compressed."""


def _first_of(w: LowRankArray, layout: Layout) -> str:
    """Which factor a product meets first, `"left"` or `"right"`; `""` where it reads both at once."""
    batch = tuple(range(w.batch))
    head = tuple(range(w.batch, w.ndim - w.tail))
    tail = tuple(range(w.ndim - w.tail, w.ndim))
    if tuple(sorted(layout.batch)) != batch or layout.batch != batch:
        return ""
    if tuple(sorted(layout.contract)) == head and layout.free == tail:
        return "left"
    if tuple(sorted(layout.contract)) == tail and layout.free == head:
        return "right"
    return ""


def _two_products(
    x: jax.Array, w: LowRankArray, layout: Layout, product: Product
) -> jax.Array | None:
    """`x` (batch…, rows, contracted…) times both factors: (batch…, rows, free…) in float32."""
    side = _first_of(w, layout)
    if not side:
        return None
    n = w.batch
    inner = w.ndim - w.tail  # the axis of `left` that holds the rank
    rows, batch = (layout.rows,), layout.batch
    shifted = lambda axes: tuple(n + 1 + axis - inner for axis in axes)
    left, right = w.left, w.right
    if side == "left":
        first = Layout(tuple(left.shape), batch, layout.contract, (inner,), rows)
        second = Layout(tuple(right.shape), batch, (n,), shifted(layout.free), rows)
        return product(product(x, left, first, True), right, second, False)
    first = Layout(tuple(right.shape), batch, shifted(layout.contract), (n,), rows)
    second = Layout(tuple(left.shape), batch, (inner,), layout.free, rows)
    return product(product(x, right, first, True), left, second, False)


def _pointwise(operation: Operation, x: jax.Array, held: Tracked) -> jax.Array | str:
    """A convolution and one of 1 x 1; or the reason why not."""
    w, numbers, out = (
        held.array,
        operation.params["dimension_numbers"],
        _channels(operation, held)[1],
    )
    reason = _grouped(operation) or ("its factors are stacked" if w.batch else "")
    if reason:
        return reason
    if (w.tail == 1 and out == w.ndim - 1) or (w.ndim - w.tail == 1 and out == 0):
        kernel, mixer = (w.left, w.right) if out == w.ndim - 1 else (w.right, w.left.T)
        y = _convolve(operation, x, replace(held, array=kernel))
        return _mixed(y, mixer, numbers.out_spec[1])
    return "its factors part other axes than the channels"


def _three_convolutions(operation: Operation, x: jax.Array, held: Tracked) -> jax.Array | str:
    """Channels mixed, the core, and channels mixed; or the reason why not."""
    w, numbers = held.array, operation.params["dimension_numbers"]
    if reason := _grouped(operation):
        return reason
    if _channels(operation, held) != (w.ndim - 2, w.ndim - 1):
        return "the last two axes of the kernel are not its channels in and out"
    x = _mixed(x, w.left, numbers.lhs_spec[1])
    groups = w.left.shape[-1] if w.is_depthwise else 1
    middle = replace(operation, params={**operation.params, "feature_group_count": groups})
    return _mixed(_convolve(middle, x, replace(held, array=w.core)), w.right, numbers.out_spec[1])


def _grouped(operation: Operation) -> str:
    params = operation.params
    alone = params["feature_group_count"] == params["batch_group_count"] == 1
    return "" if alone else "factors of grouped convolutions do not come apart"


def _channels(operation: Operation, held: Tracked) -> tuple[int, int]:
    """The stored axes of channels in and out."""
    out, read = operation.params["dimension_numbers"].rhs_spec[:2]
    rank = len(held.order)
    return held.order[read] + rank, held.order[out] + rank


def _convolve(operation: Operation, x: jax.Array, held: Tracked) -> jax.Array:
    (y,) = run_operation(operation, [x, held.materialize().astype(x.dtype)])
    return y


def _mixed(x: jax.Array, matrix: Any, axis: int) -> jax.Array:
    """A 1 x 1 convolution: channels times a matrix."""
    dense = jnp.asarray(_trees.dense(matrix)).astype(x.dtype)
    return jnp.moveaxis(jnp.tensordot(x, dense, ((axis,), (0,))), -1, axis)


def _take_rows(w: LowRankArray, index: jax.Array) -> jax.Array:
    left = jnp.take(jnp.asarray(_trees.dense(w.left)), index, axis=0)
    return replace(w, left=left).materialize()


_PLAIN = LeafRule(take_rows=_take_rows, product=_two_products, convolution=_pointwise)
_STACKED = replace(_PLAIN, take_rows=None)
register_leaf(LowRankArray, lambda w: _STACKED if w.batch else _PLAIN)
register_leaf(TuckerArray, LeafRule(convolution=_three_convolutions))
