"""A compressed array on its way to a product: the array and the order in which its axes are read."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._types import is_compressed
from jaxprune.quantize import QuantizedArray


@partial(jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("order", "path"))
@dataclass(frozen=True)
class Held:
    """A compressed array, transposed and converted without being touched.

    Attributes:
      array: the compressed leaf.
      order: axes of the leaf, counted from the end, in the order in which they are read.
      path: path of the leaf.
    """

    array: Any
    order: tuple[int, ...]
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as it is read."""
        return tuple(self.array.shape[i] for i in self.order)

    def materialize(self) -> jax.Array:
        """The dense array as it is read."""
        return jnp.transpose(self.array.materialize(), [i % len(self.order) for i in self.order])


def hold(leaf: Any, path: str) -> Any:
    """A compressed leaf held; any other as it is."""
    if not is_compressed(leaf):
        return leaf
    return Held(leaf, tuple(range(-len(leaf.shape), 0)), path)


def transposed(held: Held, permutation: tuple[int, ...]) -> Held:
    """The transpose."""
    return replace(held, order=tuple(held.order[i] for i in permutation))


def converted(held: Held, dtype: Any) -> Held | None:
    """Read as another float type, or `None` where that is no view."""
    if not jnp.issubdtype(dtype, jnp.floating) or not isinstance(held.array, QuantizedArray):
        return None
    return replace(held, array=replace(held.array, dtype=np.dtype(dtype)))


def looked_up(held: Held, index: jax.Array) -> jax.Array | None:
    """Rows of a matrix, made dense after they are taken; `None` where rows cannot be told apart.

    `index` has any shape and lies within bounds.
    """
    array = held.array
    if held.order != (-2, -1) or not isinstance(array, QuantizedArray):
        return None
    n, groups = array.shape[0], array.scale.shape[0]
    group = jnp.zeros_like(index) if groups == 1 else index // (n // groups)
    take = lambda x, at: jnp.take(x, at, axis=0)[..., None, :]
    rows = QuantizedArray(
        take(array.values, index),
        take(array.scale, group),
        None if array.zero_point is None else take(array.zero_point, group),
        replace(array.spec, group_size=None),
        array.length,
        array.dtype,
    )
    return rows.materialize()[..., 0, :]


def unstacked(held: Held) -> Held | None:
    """A stack of layers as each turn of a scan reads its slice; `None` where that is no view."""
    parts = jax.tree.leaves(held.array)
    rank = len(held.order)
    length = held.array.shape[0]
    if held.order[0] != -rank or rank < 2 or any(part.shape[0] != length for part in parts):
        return None
    return replace(held, order=held.order[1:])
