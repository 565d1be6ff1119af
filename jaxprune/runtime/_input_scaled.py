"""Quantized leaves with a factor for each input feature: the other operand takes it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.program import Layout, Operation, Tracked, run_operation
from jaxprune.quantize import InputScaledArray
from jaxprune.runtime._rules import LeafRule, register_leaf, rule_of


def _product(x: jax.Array, w: InputScaledArray, layout: Layout, product: Any) -> jax.Array | None:
    """`x` (batch…, rows, contracted…) times the factors, and the product with the codes."""
    if any(w.factor.shape[i] > 1 for i in layout.free):
        return None  # used the other way round
    order = (*layout.batch, *layout.free, *layout.contract)
    sizes = [w.factor.shape[i] for i in (*layout.batch, *layout.contract)]
    factor = jnp.transpose(w.factor, order).reshape(sizes)
    factor = jnp.expand_dims(factor, len(layout.batch))
    return product((x * factor).astype(x.dtype), w.array, layout, True)


def _convolution(operation: Operation, x: jax.Array, held: Tracked) -> jax.Array | str:
    """Channels times their factors, and the convolution; or the reason why not."""
    w, numbers = held.array, operation.params["dimension_numbers"]
    rank = len(held.order)
    channel = held.order[numbers.rhs_spec[1]] + rank
    others = [n for i, n in enumerate(w.factor.shape[-rank:]) if i != channel]
    if operation.params["feature_group_count"] > 1 or any(n > 1 for n in others):
        return "its factors are of other axes than the channels that it reads"
    shape = [1] * x.ndim
    shape[numbers.lhs_spec[1]] = -1
    scaled = (x * w.factor.reshape(shape)).astype(x.dtype)
    kernel = replace(held, array=w.array).materialize().astype(x.dtype)
    (y,) = run_operation(operation, [scaled, kernel])
    return y


def _take_rows(w: InputScaledArray, index: jax.Array) -> jax.Array:
    inner = rule_of(w.array).take_rows
    rows = w.array.materialize()[index] if inner is None else inner(w.array, index)
    factor = w.factor if w.factor.shape[0] == 1 else w.factor[index]
    return (rows.astype(jnp.float32) * factor).astype(w.dtype)


register_leaf(
    InputScaledArray, LeafRule(take_rows=_take_rows, product=_product, convolution=_convolution)
)
