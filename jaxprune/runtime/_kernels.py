"""Quantized arrays where they are no operand of a product of matrices."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxprune.graph import Held
from jaxprune.quantize import QuantizedArray


def looked_up(array: QuantizedArray, index: jax.Array) -> jax.Array:
    """Entries of the leading axis, made dense after they are taken.

    `index` has any shape and lies within bounds; the result is (index…, rest…).
    """
    n = array.shape[0]
    flat = index.reshape(-1)

    def take(x: jax.Array) -> jax.Array:
        ratio = n // x.shape[0]  # a scale for all, for each, or for each group
        return jnp.take(x, flat // ratio, axis=0)[:, None]

    # scales of groups along axis -2 lie there again once a row is a matrix of one row
    rows = jax.vmap(lambda q: q.materialize())(
        QuantizedArray(
            take(array.values),
            take(array.scale),
            None if array.zero_point is None else take(array.zero_point),
            array.spec,
            array.length,
            array.dtype,
        )
    )
    return rows[:, 0].reshape(*index.shape, *array.shape[1:])


def converted_kernel(held: Held, out_axis: int) -> tuple[jax.Array, jax.Array] | None:
    """A kernel's codes as they are read, and the scale of each output channel; `None` where scales lie
    otherwise or codes are no numbers.
    """
    array = held.array
    if not isinstance(array, QuantizedArray):
        return None
    if array.spec.format in ("nf4", "float8_e4m3fn") or array.zero_point is not None:
        return None
    rank = len(held.order)
    axis = held.order[out_axis] + rank
    shape = array.scale.shape
    if any(n != 1 for i, n in enumerate(shape) if i != axis) or shape[axis] not in (
        1,
        array.shape[axis],
    ):
        return None
    codes = replace(held, array=array.levels()).materialize()
    return codes, array.scale.reshape(-1)
