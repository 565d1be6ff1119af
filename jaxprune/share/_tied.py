"""Leaves and layers that are one tensor."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _leaves, _trees
from jaxprune._types import CompressedLeaf, PyTree, check_float, is_compressed


@_leaves.register(
    data=("scale", "left", "right"), meta=("source", "name", "extent", "order", "dtype")
)
@dataclass(frozen=True)
class TiedArray(CompressedLeaf):
    """A leaf that is another one of its tree: `scale * source[..., order] + left @ right`.

    The tensor is held once, by the source: its gradient is the sum over all places, its bytes count once,
    and it is pruned, quantized or clustered there, for all. Functions that run a model on a tree find the
    source by its path.

    Attributes:
      scale: scalar, or `None` for 1.
      left, right: (batch…, m, rank) and (rank, n) of what it adds, or `None`.
      source: path of the leaf that holds the tensor.
      name: its own path, where `source` was found.
      extent: its shape.
      order: places along the last axis of the source, or `None` as they are.
      dtype: dtype of the leaf.

    Example:
      >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
      >>> tied = jp.tie_tree(params, threshold=0.9)
      >>> tied["b"].source, tied["b"].nbytes, jp.nbytes(tied)
      ('a', 0, 16)
      >>> loss = lambda t: sum(jnp.sum(x) for x in jp.share.resolve_ties(t).values())
      >>> jax.grad(loss)(tied)["a"][0, 0].item()
      2.0
    """

    scale: Array | None
    left: Array | None
    right: Array | None
    source: str
    name: str
    extent: tuple[int, ...]
    order: tuple[int, ...] | None
    dtype: Any

    is_tie: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return self.extent

    def materialize(self) -> Array:
        """Not without its tree: see `resolved`."""
        raise ValueError(
            f"leaf {self.name!r} is tied to {self.source!r} and has no numbers of its own; resolve the "
            "ties of its whole tree first: jp.share.resolve_ties(tree)"
        )

    def check(self) -> None:
        """Nothing to check without its tree."""

    def resolved(self, path: str, leaves: dict[str, Any]) -> Any:
        """The leaf that it stands for, from the leaves of its tree by path: the very same where nothing
        differs.
        """
        found = leaves.get(path.removesuffix(self.name) + self.source)
        if found is None or not path.endswith(self.name):
            raise ValueError(
                f"leaf {path!r} is tied to {self.source!r}, which is not in this tree; pass the tree "
                "that jp.tie_tree made, whole, or resolve its ties first: jp.share.resolve_ties(tree)"
            )
        if self.scale is None and self.left is None and self.order is None:
            return found if found.dtype == self.dtype else found.astype(self.dtype)
        x = jnp.asarray(_trees.dense(found))
        if self.order is not None:
            x = jnp.take(x, np.asarray(self.order), axis=-1)
        if self.scale is not None:
            x = x * self.scale.astype(x.dtype)
        if self.left is not None and self.right is not None:
            delta = _trees.dense(self.left) @ _trees.dense(self.right)
            x = x + delta.reshape(x.shape).astype(x.dtype)
        return x.astype(self.dtype)


def ties(tree: PyTree) -> dict[str, str]:
    """The source of each tied leaf of a tree, by path.

    Example:
      >>> params = {"a": jnp.eye(2), "b": jnp.eye(2) * 1.1, "c": -jnp.eye(2)}
      >>> jp.share.ties(jp.tie_tree(params, threshold=0.99))
      {'b': 'a'}
    """
    paths, leaves, _ = _trees.flatten(tree)
    return {p: leaf.source for p, leaf in zip(paths, leaves, strict=True) if _trees.is_tie(leaf)}


@_leaves.register(data=("shared", "scale"), meta=("owner",))
@dataclass(frozen=True)
class TiedLayers(CompressedLeaf):
    """A stack of layers some of which are one tensor: layer `i` is `scale[i] * shared[owner[i]]`.

    Attributes:
      shared: (tensors, …); an array, or a compressed leaf itself.
      scale: (layers,), or `None` for 1.
      owner: which tensor each layer is.

    Example:
      >>> params = {"layers": jnp.stack([jnp.eye(3), jnp.ones((3, 3)), jnp.eye(3)])}
      >>> tied = jp.tie_tree(params, threshold=0.9, layers="layers")
      >>> tied["layers"].owner
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
        check_float(dtype)
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
