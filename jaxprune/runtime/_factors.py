"""Products and convolutions with factorised leaves: one after the other, the small one in the middle."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _trees
from jaxprune.program import Layout, Operation, Tracked, run_operation
from jaxprune.quantize import QuantizedArray
from jaxprune.runtime._activations import How, rounded
from jaxprune.runtime._choose import lowering_for, run
from jaxprune.share import ClusteredArray, LowRankArray, TuckerArray


def sides_of(w: LowRankArray, layout: Layout) -> str:
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


def two_products(x: jax.Array, w: LowRankArray, layout: Layout, how: How) -> jax.Array:
    """`x` (batch…, rows, contracted…) times both factors: (batch…, rows, free…) in float32."""
    n = w.batch
    inner = w.ndim - w.tail  # the axis of `left` that holds the rank
    rows, batch = (layout.rows,), layout.batch
    shifted = lambda axes: tuple(n + 1 + axis - inner for axis in axes)
    left, right = w.left, w.right
    if sides_of(w, layout) == "left":
        first = Layout(tuple(left.shape), batch, layout.contract, (inner,), rows)
        second = Layout(tuple(right.shape), batch, (n,), shifted(layout.free), rows)
        return _product(_product(x, left, first, how), right, second, None)
    first = Layout(tuple(right.shape), batch, shifted(layout.contract), (n,), rows)
    second = Layout(tuple(left.shape), batch, (inner,), layout.free, rows)
    return _product(_product(x, right, first, how), left, second, None)


def _product(x: jax.Array, factor: Any, layout: Layout, how: How) -> jax.Array:
    plain = isinstance(factor, QuantizedArray) or (
        isinstance(factor, ClusteredArray) and factor.is_plain
    )
    if plain and len(layout.shape) - 1 not in layout.batch:
        return run(lowering_for(factor, how, layout)[0], x, factor, layout, how)
    axes = tuple(range(x.ndim - len(layout.contract), x.ndim))
    x = rounded(x, axes, how)
    y = layout.dot(x[None], _trees.dense(factor).astype(jnp.float32), jnp.float32)
    return jnp.squeeze(y, len(layout.batch))


def factored_convolution(operation: Operation, x: jax.Array, held: Tracked) -> jax.Array | str:
    """A convolution with a factorised kernel as two or three; or the reason why not."""
    params, numbers = operation.params, operation.params["dimension_numbers"]
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return "factors of grouped convolutions do not come apart"
    rank = len(held.order)
    out, read = (held.order[i] + rank for i in numbers.rhs_spec[:2])
    w = held.array
    if isinstance(w, TuckerArray):
        if (read, out) != (rank - 2, rank - 1):
            return "the last two axes of the kernel are not its channels in and out"
        return _three(operation, x, held)
    if w.batch:
        return "its factors are stacked"
    if (w.tail == 1 and out == rank - 1) or (w.ndim - w.tail == 1 and out == 0):
        kernel, mixer = (w.left, w.right) if out == rank - 1 else (w.right, w.left.T)
        y = _convolve(operation, x, replace(held, array=kernel))
        return _mixed(y, mixer, numbers.out_spec[1])
    return "its factors part other axes than the channels"


def _three(operation: Operation, x: jax.Array, held: Tracked) -> jax.Array:
    w, numbers = held.array, operation.params["dimension_numbers"]
    x = _mixed(x, w.left, numbers.lhs_spec[1])
    groups = w.left.shape[-1] if w.is_depthwise else 1
    middle = replace(operation, params={**operation.params, "feature_group_count": groups})
    return _mixed(_convolve(middle, x, replace(held, array=w.core)), w.right, numbers.out_spec[1])


def _convolve(operation: Operation, x: jax.Array, held: Tracked) -> jax.Array:
    (y,) = run_operation(operation, [x, held.materialize().astype(x.dtype)])
    return y


def _mixed(x: jax.Array, matrix: Any, axis: int) -> jax.Array:
    """A 1 x 1 convolution: channels times a matrix."""
    dense = jnp.asarray(_trees.dense(matrix)).astype(x.dtype)
    return jnp.moveaxis(jnp.tensordot(x, dense, ((axis,), (0,))), -1, axis)
