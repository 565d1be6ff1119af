"""Masks at work: apply, count, pack."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt8

from jaxprune import _bits, _checks, _leaves, _trees
from jaxprune._types import CompressedLeaf, MaskFn, Masks, Params, PyTree, Where, is_compressed


def apply_masks(params: Params, masks: Masks) -> Params:
    """Parameters with masked entries set to exactly zero.

    Args:
      params: any tree of arrays.
      masks: tree of bools with the structure of `params`; each broadcasts against its parameter.

    Returns:
      A tree like `params`: same shapes and dtypes.

    Raises:
      ValueError: trees of different structure, or a mask that does not broadcast.
      TypeError: a mask that is not bool, or one of a compressed leaf, which it would make dense.

    Example:
      >>> jp.apply_masks({"w": jnp.ones(3)}, {"w": jnp.array([True, False, True])})
      {'w': Array([1., 0., 1.], dtype=float32)}
    """
    masks = _checks.masks_fit(masks, params)
    return _trees.map_with_path(lambda path, p, m: masked(p, m, path), params, masks)


def masked(param: Any, mask: Any, path: str = "") -> Any:
    """One leaf with masked entries zero; a leaf with the concrete mask `True` is returned as it is."""
    if np.ndim(mask) == 0 and not _checks.is_traced(mask) and bool(mask):
        return param
    if is_compressed(param):
        raise TypeError(
            f"params: leaf {path!r} is a {type(param).__name__}, which a mask would make dense; mask "
            "before compressing (a QATArray takes its own: jp.qat.prepare(params, masks=masks)), or make "
            "it dense first: jp.materialize_tree(params)"
        )
    return jnp.where(mask, param, jnp.zeros((), jnp.result_type(param)))


def sparsity(tree: Params | Masks, *, where: Where = None) -> float | jax.Array:
    """The fraction of zeros among the weights of a tree, or of `False` among its masks.

    Args:
      tree: parameters (compressed leaves count as what they stand for) or masks.
      where: which leaves of parameters count; by default the weights (`jp.quantize_tree` says which). Of
        masks, all count but scalars, which stand for unpruned leaves.

    Returns:
      A fraction in [0, 1]: a Python float, or a traced scalar under `jit`. 0 for a tree without
      such leaves.

    Example:
      >>> jp.sparsity({"w": jnp.array([[1.0, 0.0, 0.0, 2.0]]), "b": jnp.zeros(4)})
      0.5
      >>> jp.sparsity({"w": jnp.array([True, False]), "b": jnp.array(True)})
      0.5
    """
    tree = unpack_masks(tree)
    _, leaves, _ = _trees.flatten(tree)
    bools = [leaf for leaf in leaves if getattr(leaf, "dtype", None) == np.bool_]
    if bools and where is None:
        counted = [leaf for leaf in bools if np.ndim(leaf) > 0]
    else:
        chosen = _trees.select(tree, where)
        counted = [_trees.dense(x) for x, hit in zip(leaves, chosen, strict=True) if hit]
    size = sum(x.size for x in counted)
    if not size:
        return 0.0
    zeros = [jnp.sum(x == 0, dtype=jnp.int32) for x in counted]
    if any(_checks.is_traced(n) for n in zeros):
        return jnp.sum(jnp.stack([n.astype(jnp.float32) for n in zeros])) / size
    return sum(int(n) for n in jax.device_get(zeros)) / size


@_leaves.register(data=("bits",), meta=("length",))
@dataclass(frozen=True)
class PackedMask(CompressedLeaf):
    """A mask of one bit per entry, packed along the last axis; see `jp.pack_masks`.

    Attributes:
      bits: uint8 of shape `(..., ceil(length / 8))`, see `_bits`.
      length: size of the mask's last axis; -1 for a scalar mask, held in `bits` of shape `(1,)`.
    """

    bits: UInt8[Array, "*lead bytes"]
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the mask."""
        return (*self.bits.shape[:-1], self.length) if self.length >= 0 else self.bits.shape[:-1]

    @property
    def dtype(self) -> np.dtype:
        """bool."""
        return np.dtype(bool)

    def materialize(self) -> Bool[Array, "..."]:
        """The mask, one byte per entry."""
        mask = _bits.unpack(self.bits, 1, abs(self.length), signed=False).astype(bool)
        return mask if self.length >= 0 else mask[..., 0]


@partial(jax.tree_util.register_dataclass, data_fields=("leaves",), meta_fields=("treedef",))
@dataclass(frozen=True)
class PackedTree:
    """A tree of packed masks as one flat node, as optimizer states hold it.

    Containers that keep each leaf of a tree in a box of their own (`nnx.State` keeps variables) take
    no compound leaves; this node is outside of them.

    Attributes:
      leaves: the `PackedMask` leaves, in flatten order.
      treedef: structure of the tree of masks.
    """

    leaves: tuple[PackedMask, ...]
    treedef: Any

    @classmethod
    def of(cls, masks: Masks) -> "PackedTree":
        """Packs a tree of bools. Inverse of `unpack`."""
        _, leaves, treedef = _trees.flatten(pack_masks(masks))
        return cls(tuple(leaves), treedef)

    def unpack(self, like: Params | None = None) -> Masks:
        """The tree of bools, in the containers of `like` if given. Inverse of `of`."""
        treedef = self.treedef if like is None else _trees.flatten(like)[2]
        return treedef.unflatten(leaf.materialize() for leaf in self.leaves)


def pack_masks(masks: Masks) -> PyTree:
    """Masks at one bit per entry, any shape. Inverse of `unpack_masks`.

    Bits are packed along the last axis, so that packed masks shard and slice along the others.

    Args:
      masks: tree of bools.

    Returns:
      The same tree with `PackedMask` leaves.

    Raises:
      TypeError: a leaf that is not bool.

    Example:
      >>> packed = jp.pack_masks({"w": jnp.ones((4, 10), bool)})
      >>> packed["w"].nbytes
      8
    """
    return _trees.map_with_path(_pack, masks)


def unpack_masks(packed: PyTree) -> Masks:
    """Bools from packed masks. Inverse of `pack_masks`.

    Args:
      packed: tree with `PackedMask` leaves; other leaves stay as they are.

    Returns:
      The tree of bools that was packed.

    Example:
      >>> masks = {"w": jnp.array([[True, False, True]])}
      >>> jp.unpack_masks(jp.pack_masks(masks))
      {'w': Array([[ True, False,  True]], dtype=bool)}
    """
    return jax.tree.map(
        lambda x: x.materialize() if isinstance(x, PackedMask) else x, packed, is_leaf=is_compressed
    )


def _pack(path: str, mask: Any) -> PackedMask:
    if isinstance(mask, PackedMask):
        return mask
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"masks: leaf {path!r} has dtype {mask.dtype}, expected bool")
    length = mask.shape[-1] if mask.ndim else -1
    return PackedMask(_bits.pack(mask.reshape(mask.shape or (1,)), 1), length)


def resolve(masks: Masks | MaskFn, params: Params) -> Masks:
    """The masks for some parameters: the tree itself (packed or not) or what the callable returns."""
    tree = unpack_masks(masks(params) if _trees.is_function(masks) else masks)
    return _checks.masks_fit(tree, params)
