"""Leaves and layers that are one tensor."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _trees
from jaxprune._types import Params, PyTree, is_compressed


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("scale", "left", "right"),
    meta_fields=("source", "order", "dtype"),
)
@dataclass(frozen=True)
class Tie:
    """A leaf that is another one: `scale * source[..., order] + left @ right`.

    Attributes:
      scale: scalar, or `None` for 1.
      left, right: (batch…, m, rank) and (rank, n) of what it adds, or `None`.
      source: path of the leaf that holds the tensor.
      order: places along the last axis of the source, or `None` as they are.
      dtype: dtype of the leaf.
    """

    scale: Array | None
    left: Array | None
    right: Array | None
    source: str
    order: tuple[int, ...] | None
    dtype: Any

    def of(self, leaf: Any) -> Any:
        """The leaf that it stands for, from the source: the very same where nothing differs."""
        if self.scale is None and self.left is None and self.order is None:
            return leaf if leaf.dtype == self.dtype else leaf.astype(self.dtype)
        x = jnp.asarray(_trees.dense(leaf))
        if self.order is not None:
            x = jnp.take(x, np.asarray(self.order), axis=-1)
        if self.scale is not None:
            x = x * self.scale.astype(x.dtype)
        if self.left is not None and self.right is not None:
            delta = _trees.dense(self.left) @ _trees.dense(self.right)
            x = x + delta.reshape(x.shape).astype(x.dtype)
        return x.astype(self.dtype)


def _is_leaf(x: Any) -> bool:
    return is_compressed(x) or isinstance(x, Tie)


@partial(jax.tree_util.register_dataclass, data_fields=("tree",), meta_fields=())
@dataclass(frozen=True)
class TiedTree:
    """Parameters some of whose leaves are others; from `jp.tie_tree`.

    A pytree that jits, checkpoints and trains like any: each tensor is held once, and its gradient is
    the sum over all its places.

    Attributes:
      tree: the parameters, with a `Tie` in the place of each tied leaf.

    Example:
      >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
      >>> tied = jp.tie_tree(params, threshold=0.9)
      >>> jp.nbytes(tied), list(tied.expand())
      (16, ['a', 'b'])
      >>> jax.grad(lambda t: jnp.sum(t.expand()["a"] + t.expand()["b"]))(tied).tree["a"][0, 0].item()
      2.0
    """

    tree: PyTree

    def expand(self) -> Params:
        """The tree that functions take; tied leaves are the very same array, not a copy."""
        items, treedef = jax.tree_util.tree_flatten_with_path(self.tree, is_leaf=_is_leaf)
        held = {_trees.path_str(path): leaf for path, leaf in items}
        return treedef.unflatten(
            leaf.of(held[leaf.source]) if isinstance(leaf, Tie) else leaf for _, leaf in items
        )

    @property
    def ties(self) -> dict[str, str]:
        """The source of each tied leaf, by path."""
        items, _ = jax.tree_util.tree_flatten_with_path(self.tree, is_leaf=_is_leaf)
        return {_trees.path_str(p): leaf.source for p, leaf in items if isinstance(leaf, Tie)}


@partial(jax.tree_util.register_dataclass, data_fields=("shared", "scale"), meta_fields=("owner",))
@dataclass(frozen=True)
class TiedLayers:
    """A stack of layers some of which are one tensor: layer `i` is `scale[i] * shared[owner[i]]`.

    Attributes:
      shared: (tensors, …); an array, or a compressed leaf itself.
      scale: (layers,), or `None` for 1.
      owner: which tensor each layer is.

    Example:
      >>> params = {"layers": jnp.stack([jnp.eye(3), jnp.ones((3, 3)), jnp.eye(3)])}
      >>> tied = jp.tie_tree(params, threshold=0.9, layers="layers")
      >>> tied.expand()["layers"].owner
      (0, 1, 0)
    """

    shared: Any
    scale: Array | None
    owner: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return (len(self.owner), *self.shared.shape[1:])

    @property
    def dtype(self) -> Any:
        """Dtype of the stack."""
        return self.shared.dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the stack."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the stack."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def materialize(self) -> Array:
        """The whole stack."""
        found = jnp.asarray(_trees.dense(self.shared))[np.asarray(self.owner)]
        if self.scale is None:
            return found
        return found * self.scale.astype(found.dtype).reshape(-1, *(1 for _ in found.shape[1:]))

    def __getitem__(self, index: int) -> Any:
        """One layer."""
        layer = self.shared[self.owner[index]]
        return layer if self.scale is None else _trees.dense(layer) * self.scale[index]

    def astype(self, dtype: Any) -> "TiedLayers":
        """The same ties, of another float type."""
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"dtype: expected a float type, got {dtype}; use materialize() first")
        return replace(self, shared=self.shared.astype(dtype))

    def stacked(self) -> Any:
        """The stack as loops over the leading axis slice it; a compressed tensor stays compressed."""
        if self.scale is not None or not is_compressed(self.shared):
            return self.materialize()
        shared = self.shared
        shared = shared.stacked() if hasattr(type(shared), "stacked") else shared
        parts = jax.tree.leaves(shared)
        if shared is None or any(x.shape[:1] != self.shared.shape[:1] for x in parts):
            return self.materialize()
        return jax.tree.map(lambda x: x[np.asarray(self.owner)], shared)

    def quantized(self, quantize: Any, spec: Any) -> "TiedLayers":
        """With a shared tensor quantized by `quantize(array, spec)`."""
        return replace(self, shared=quantize(_trees.dense(self.shared), spec))
