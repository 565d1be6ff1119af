"""Tracked parameters: on their way through a program to the operations that use them.

A tracked parameter passes through views (transpose, conversion, reshape, slices of its first axis)
without being touched, and through loops that read it or map over it.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import is_compressed
from jaxprune.program._primitives import is_identity, is_view
from jaxprune.program._program import Operation
from jaxprune.program._sizes import sized


@partial(
    jax.tree_util.register_dataclass, data_fields=("array", "note"), meta_fields=("order", "path")
)
@dataclass(frozen=True)
class Tracked:
    """A parameter on its way: the array, and the order in which its axes are read.

    Attributes:
      array: a compressed leaf, not made dense, or a plain array.
      order: axes of the array, counted from the end, in the order in which they are read.
      path: path of the leaf.
      note: arrays that travel along; those with axes are stacked as the leaf is in loops over layers.
    """

    array: Any
    order: tuple[int, ...]
    path: str
    note: Any = None

    @classmethod
    def of(cls, array: Any, path: str, note: Any = None) -> "Tracked":
        """An array as it enters."""
        return cls(array, tuple(range(-len(array.shape), 0)), path, note)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as it is read."""
        return tuple(self.array.shape[i] for i in self.order)

    @property
    def dtype(self) -> Any:
        """Dtype as it is read."""
        return self.array.dtype

    @property
    def is_straight(self) -> bool:
        """Whether the axes are read in their own order."""
        return self.order == tuple(range(-len(self.order), 0))

    def materialize(self) -> jax.Array:
        """The dense array as it is read."""
        dense = _trees.dense(self.array)
        return (
            dense
            if self.is_straight
            else jnp.transpose(dense, [i % dense.ndim for i in self.order])
        )


def view(operation: Operation, operands: list[Any], shape: tuple[int, ...]) -> list[Any] | None:
    """The results of an operation that only looks at a tracked parameter in another way, or `None`.

    `shape` is that of its first result.
    """
    name, params, first = operation.name, operation.params, operands[0]
    if is_identity(name) or name == "reduce_precision":
        return list(operands[: len(operation.outs)])
    if not isinstance(first, Tracked):
        return None
    if name == "transpose":
        return [replace(first, order=tuple(first.order[i] for i in params["permutation"]))]
    if name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
        return _changed(first, "astype", params["new_dtype"])
    whole = is_view(name) and math.prod(sized(shape)) == math.prod(first.shape)
    if whole and first.is_straight:
        return _reshaped(first, shape)
    if name == "slice":
        return _sliced(first, params)
    if name == "dynamic_slice":
        return _dynamically_sliced(first, operands[1:], params["slice_sizes"])
    return None


def _changed(tracked: Tracked, method: str, *arguments: Any) -> list[Any] | None:
    """The array changed by a method of its own; `None` where it has none, or refuses."""
    change = getattr(tracked.array, method, None)
    if change is None:
        return None
    try:
        return [replace(tracked, array=change(*arguments))]
    except TypeError:
        return None


def _reshaped(tracked: Tracked, shape: tuple[int, ...]) -> list[Any] | None:
    found = _changed(tracked, "reshape", shape)
    if found is None:
        return None
    array, note = found[0].array, tracked.note
    if note is not None and len(tracked.shape) > len(shape) and tracked.shape[:1] == (1,):
        note = _index_note(note, 0)  # one layer out of a stack
    return [Tracked.of(array, tracked.path, note)]


def _index_note(note: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index] if jnp.ndim(x) else x, note)


def _sliced(tracked: Tracked, params: dict[str, Any]) -> list[Any] | None:
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)
    whole = all(
        s == 0 and e == n and k == 1
        for s, e, n, k in zip(starts[1:], limits[1:], tracked.shape[1:], strides[1:], strict=True)
    )
    if not whole or not tracked.is_straight or strides[0] != 1:
        return None
    return _leading(tracked, starts[0], limits[0] - starts[0])


def _dynamically_sliced(
    tracked: Tracked, starts: list[Any], sizes: tuple[int, ...]
) -> list[Any] | None:
    if not tracked.is_straight or tuple(sizes[1:]) != tracked.shape[1:]:
        return None
    return _leading(tracked, jnp.clip(starts[0], 0, tracked.shape[0] - sizes[0]), sizes[0])


def _leading(tracked: Tracked, start: Any, size: int) -> list[Any] | None:
    if not is_compressed(tracked.array):
        cut = jax.lax.dynamic_slice_in_dim(tracked.array, start, size)
        found: list[Any] | None = [replace(tracked, array=cut)]
    else:
        found = _changed(tracked, "block", start, size)
    if found is None or tracked.note is None:
        return found
    cut_note = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size) if jnp.ndim(x) else x
    return [replace(found[0], note=jax.tree.map(cut_note, tracked.note))]


def unstacked(tracked: Tracked) -> Tracked | None:
    """A stack of layers as each iteration of a scan reads its slice; `None` where that is no view."""
    rank, length = len(tracked.order), tracked.shape[0] if tracked.order else 0
    if rank < 2 or tracked.order[0] != -rank:
        return None
    if hasattr(type(tracked.array), "stacked"):
        layers = tracked.array.stacked()
        if layers is None:
            return None
        tracked = replace(tracked, array=layers)
    parts = jax.tree.leaves(tracked.array)
    if any(np.shape(x)[:1] != (length,) for x in parts):
        return None
    notes = jax.tree.map(
        lambda x: x if jnp.ndim(x) else jnp.broadcast_to(x, (length,)), tracked.note
    )
    return replace(tracked, order=tracked.order[1:], note=notes)
