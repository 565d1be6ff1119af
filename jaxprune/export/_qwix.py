"""Quantized leaves of other libraries: qwix."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._types import PyTree
from jaxprune.quantize import QuantizedArray, Spec

_BITS = {"int8": 8, "int4": 4, "int2": 2}


def _qarray() -> Any:
    try:
        return importlib.import_module("qwix").QArray
    except ImportError as error:
        raise ImportError("to_qwix needs qwix (Python 3.12 or newer): pip install qwix") from error


def to_qwix(tree: PyTree) -> PyTree:
    """Replaces `QuantizedArray` leaves by qwix's `QArray`, with the same codes and scales.

    Args:
      tree: any tree.

    Returns:
      The tree with `qwix.QArray` leaves; other leaves stay. Inverse: `from_qwix`.

    Raises:
      ImportError: qwix is not installed.

    Example:
      >>> jp.export.to_qwix({"b": 1.0})  # leaves that are not quantized stay
      {'b': 1.0}
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedArray):
            return leaf
        name = leaf.spec.format
        kind: Any = name if name == "nf4" else jnp.dtype(name)
        codes = leaf.levels().astype(jnp.uint4 if name == "nf4" else kind)
        zero = None if leaf.zero_point is None else leaf.zero_point.astype(kind)
        return _qarray()(codes, leaf.scale, zero, kind)  # scales stay as precise as they are

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, QuantizedArray))


def from_qwix(tree: PyTree) -> PyTree:
    """Replaces qwix's `QArray` leaves by `QuantizedArray`, with the same codes and scales.

    Args:
      tree: any tree; leaves with `qvalue`, `scale`, `zero_point` and `qtype` count as `QArray`.

    Returns:
      The tree with `QuantizedArray` leaves. Inverse: `to_qwix`.

    Raises:
      ValueError: a format that `QuantizedArray` does not have, or scales in tiles of another axis than
        the one before the last; the message names the leaf.

    Example:
      >>> jp.export.from_qwix({"b": 1.0})
      {'b': 1.0}
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_qarray)
    return treedef.unflatten(
        _from_qarray(jax.tree_util.keystr(path), leaf) if _is_qarray(leaf) else leaf
        for path, leaf in found
    )


def _is_qarray(x: Any) -> bool:
    return all(
        hasattr(type(x), "__dataclass_fields__") and hasattr(x, f) for f in ("qvalue", "qtype")
    )


def _from_qarray(path: str, leaf: Any) -> QuantizedArray:
    kind = leaf.qtype if isinstance(leaf.qtype, str) else jnp.dtype(leaf.qtype).name
    if kind not in (*_BITS, "nf4", "float8_e4m3fn"):
        raise ValueError(
            f"tree: leaf {path} is {kind}; expected int8, int4, int2, nf4 or float8_e4m3fn"
        )
    shape, scales = leaf.qvalue.shape, leaf.scale.shape
    for axis, (n, m) in enumerate(zip(shape, scales, strict=True)):
        if m not in (1, n) and axis != len(shape) - 2:
            raise ValueError(
                f"tree: leaf {path} of shape {shape} has scales {scales}, in tiles of axis {axis}; "
                "expected tiles of axis -2 only"
            )
    tiled = len(shape) > 1 and scales[-2] not in (1, shape[-2])
    spec = Spec(
        bits=_BITS.get(kind, 8),
        dtype=kind,
        symmetric=leaf.zero_point is None,
        group_size=shape[-2] // scales[-2] if tiled else None,
        full_range=leaf.zero_point is None and kind in _BITS,
    )
    codes = leaf.qvalue
    scale = leaf.scale
    if len(shape) >= 3 and scales[0] == 1 != shape[0]:
        scale = jnp.broadcast_to(scale, (shape[0], *scales[1:]))
    zero = None if leaf.zero_point is None else jnp.broadcast_to(leaf.zero_point, scale.shape)
    stored = None if zero is None else zero.astype(jnp.int8)
    return QuantizedArray.of_levels(codes, scale, stored, spec, np.dtype(leaf.dtype))
