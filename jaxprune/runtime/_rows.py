"""Rows of compressed arrays."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._trees import dense
from jaxprune._types import is_compressed
from jaxprune.quantize import QuantizedArray
from jaxprune.share import ClusteredArray, LowRankArray
from jaxprune.sparse import SparseArray


def looked_up(array: Any, index: jax.Array) -> jax.Array:
    """Entries of the leading axis, made dense after they are taken.

    `index` has any shape and lies within bounds; the result is (index…, rest…).
    """
    n = array.shape[0]
    flat = index.reshape(-1)
    if isinstance(array, LowRankArray):
        left = jnp.take(jnp.asarray(dense(array.left)), flat, axis=0)
        return replace(array, left=left).materialize().reshape(*index.shape, *array.shape[1:])
    if isinstance(array, SparseArray):
        values = (
            looked_up(array.values, flat)
            if is_compressed(array.values)
            else jnp.take(array.values, flat, axis=0)
        )
        rows = replace(array, values=values, flags=jnp.take(array.flags, flat, axis=0))
        return rows.materialize().reshape(*index.shape, *array.shape[1:])
    if isinstance(array, ClusteredArray):
        return _looked_up_clusters(array, flat).reshape(*index.shape, *array.shape[1:])

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


def _looked_up_clusters(array: ClusteredArray, index: jax.Array) -> jax.Array:
    """Rows (n, rest…) of a clustered array; groups along the leading axis have codebooks of their own."""
    book = array.codewords()
    planes = tuple(jnp.take(x, index, axis=0) for x in array.indices)
    if book.shape[0] > 1:
        book = jnp.take(book, index // (array.shape[0] // book.shape[0]), axis=0)
    return replace(array, codebook=book, indices=planes, copies=None).materialize()
