"""The structure of a tree as plain JSON, and back, so that loading needs no template.

Arrays are numbered; everything else stands in the structure itself. Known nodes: dict, list, tuple,
None, named tuples, Flax `FrozenDict` and `nnx.State`, and this library's compressed leaves.
"""

import dataclasses
import importlib
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune._types import PyTree
from jaxprune.masks import PackedMask, PackedTree
from jaxprune.qat import QATArray
from jaxprune.quantize import (
    ActivationQuantized,
    DynamicInput,
    InputScale,
    QuantizedArray,
    Spec,
)
from jaxprune.share import (
    ClusteredArray,
    LowRankArray,
    Tie,
    TiedLayers,
    TiedTree,
    TuckerArray,
    packed,
)
from jaxprune.sparse import SparseArray

_TRUSTED = ("chex", "flax", "jax", "jaxprune", "optax")  # packages that loading may import
_LARGE = 1024  # bytes of arrays that are compared with others
_FROZEN = ("flax.core", "FrozenDict")
_STATE = ("flax.nnx", "State")

# a compressed leaf's class, and how its static fields become JSON and come back
_COMPRESSED: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "QuantizedArray": (
        QuantizedArray,
        lambda q: {
            "spec": dataclasses.asdict(q.spec),
            "length": q.length,
            "dtype": np.dtype(q.dtype).name,
        },
        lambda meta: {
            "spec": Spec(**meta["spec"]),
            "length": meta["length"],
            "dtype": jax.numpy.dtype(meta["dtype"]),
        },
    ),
    "ClusteredArray": (
        ClusteredArray,
        lambda c: {
            "bits": c.bits,
            "length": c.length,
            "dtype": np.dtype(c.dtype).name,
            "dim": c.dim,
            "zero": c.zero,
            "copies": c.copies,
        },
        lambda meta: {**meta, "dtype": jax.numpy.dtype(meta["dtype"])},
    ),
    "LowRankArray": (
        LowRankArray,
        lambda x: {"tail": x.tail, "dtype": np.dtype(x.dtype).name},
        lambda meta: {**meta, "dtype": jax.numpy.dtype(meta["dtype"])},
    ),
    "SparseArray": (
        SparseArray,
        lambda x: {
            **{name: getattr(x, name) for name in ("n", "m", "axis", "length", "per")},
            "dtype": np.dtype(x.dtype).name,
        },
        lambda meta: {**meta, "dtype": jax.numpy.dtype(meta["dtype"])},
    ),
    "TuckerArray": (
        TuckerArray,
        lambda x: {"dtype": np.dtype(x.dtype).name},
        lambda meta: {"dtype": jax.numpy.dtype(meta["dtype"])},
    ),
    "TiedLayers": (
        TiedLayers,
        lambda x: {"owner": list(x.owner)},
        lambda meta: {"owner": tuple(meta["owner"])},
    ),
    "TiedTree": (TiedTree, lambda x: {}, lambda meta: meta),
    "Tie": (
        Tie,
        lambda x: {
            "source": x.source,
            "order": x.order and list(x.order),
            "dtype": np.dtype(x.dtype).name,
        },
        lambda meta: {
            "source": meta["source"],
            "order": meta["order"] and tuple(meta["order"]),
            "dtype": jax.numpy.dtype(meta["dtype"]),
        },
    ),
    "QATArray": (
        QATArray,
        lambda q: {"spec": dataclasses.asdict(q.spec)},
        lambda meta: {"spec": Spec(**meta["spec"])},
    ),
    "ActivationQuantized": (ActivationQuantized, lambda a: {}, lambda meta: meta),
    "InputScale": (
        InputScale,
        lambda s: {"bits": s.bits, "training": s.training},
        lambda meta: meta,
    ),
    "DynamicInput": (DynamicInput, lambda d: {"dtype": d.dtype}, lambda meta: meta),
    "PackedMask": (PackedMask, lambda m: {"length": m.length}, lambda meta: meta),
}


@dataclasses.dataclass
class _Arrays:
    """Arrays numbered; equal ones are one.

    Attributes:
      held: the arrays.
      symbols: put indices of clusters in bytes of their own, as entropy coding wants them.
      known: numbers of large ones, by content.
    """

    held: list[Any]
    symbols: bool
    known: dict[Any, list[int]]

    def number(self, array: Any) -> int:
        """The number of an array, which is stored once however often it comes."""
        large = array.size * array.dtype.itemsize >= _LARGE and getattr(
            array, "is_fully_addressable", True
        )
        if large:
            host = np.ascontiguousarray(array)
            key = (host.shape, str(host.dtype), zlib.crc32(host.view(np.uint8).data))
            for i in self.known.setdefault(key, []):
                if np.array_equal(np.asarray(self.held[i]).view(np.uint8), host.view(np.uint8)):
                    return i
            self.known[key].append(len(self.held))
        self.held.append(array)
        return len(self.held) - 1


def encode(tree: PyTree, *, symbols: bool = False) -> tuple[dict[str, Any], list[Any]]:
    """The structure of `tree` and its arrays, in order, equal ones once. Inverse of `decode`.

    `symbols`: indices of clusters are put in bytes of their own, for entropy coding.

    Raises:
      TypeError: a node or leaf that cannot be rebuilt without its program, named with its path.
    """
    arrays = _Arrays([], symbols, {})
    return _encode(tree, "", arrays), arrays.held


def _encode(node: Any, path: str, arrays: _Arrays) -> dict[str, Any]:
    below = lambda key, child: _encode(child, f"{path}/{key}" if path else str(key), arrays)
    if arrays.symbols and isinstance(node, ClusteredArray):
        meta = _COMPRESSED["ClusteredArray"][1](node)
        children = {
            "codebook": below("codebook", node.codebook),
            "index": below("index", node.index()),
        }
        return {"kind": "symbols", "meta": meta, "children": children}
    for name, (cls, to_meta, _) in _COMPRESSED.items():
        if isinstance(node, cls):
            meta = to_meta(node)
            fields = [f.name for f in dataclasses.fields(node) if f.name not in meta]
            children = {f: below(f, getattr(node, f)) for f in fields}
            return {"kind": "compressed", "type": name, "meta": meta, "children": children}
    if isinstance(node, PackedTree):
        return {"kind": "packed", "tree": below("masks", node.treedef.unflatten(node.leaves))}
    if node is None:
        return {"kind": "none"}
    if isinstance(node, (bool, int, float, str)):
        return {"kind": "value", "value": node}
    if isinstance(node, (jax.Array, np.ndarray, np.generic)):
        if jax.numpy.issubdtype(node.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"tree: leaf {path!r} is a typed PRNG key; save jax.random.key_data(key) instead"
            )
        return {"kind": "array", "index": arrays.number(node)}
    if isinstance(node, Mapping):
        kind = "dict"
        if _is(node, *_FROZEN):
            kind = "frozen"
        elif _is(node, *_STATE):
            kind = "state"
        elif type(node) is not dict:
            raise TypeError(_unknown(node, path))
        inner = node.raw_mapping if kind == "state" else node  # its own items are wrapped again
        items = [[key, below(key, child)] for key, child in inner.items()]
        for key, _ in items:
            if not isinstance(key, (str, int)):
                raise TypeError(
                    f"tree: key {key!r} under {path!r} is neither a string nor an integer"
                )
        return {"kind": kind, "items": items}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        cls = type(node)
        fields = {f: below(f, getattr(node, f)) for f in node._fields}
        return {"kind": "named", "type": [cls.__module__, cls.__qualname__], "children": fields}
    if type(node) in (list, tuple):
        items = [below(i, child) for i, child in enumerate(node)]
        return {"kind": type(node).__name__, "items": items}
    if _is_variable(node):
        value = below("value", node.get_value() if hasattr(node, "get_value") else node.value)
        return {"kind": "variable", "type": type(node).__name__, "value": value}
    raise TypeError(_unknown(node, path))


def _unknown(node: Any, path: str) -> str:
    return (
        f"tree: {type(node).__name__} at {path or 'the root'!r} cannot be loaded back without its "
        "class; save its fields as a dict (for Flax modules and TrainState: their params)"
    )


def _is(node: Any, module: str, name: str) -> bool:
    """Whether `node` is of a class of an optional package, without importing that package."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(node, getattr(loaded, name))


def _is_variable(node: Any) -> bool:
    return _is(node, "flax.nnx", "Variable")


def decode(structure: dict[str, Any], arrays: list[Any]) -> PyTree:
    """The tree of a structure and its arrays. Inverse of `encode`.

    Raises:
      ValueError: a structure of an unknown kind, or a class that is not at hand.
    """
    kind = structure["kind"]
    back = lambda child: decode(child, arrays)
    if kind == "array":
        return arrays[structure["index"]]
    if kind == "value":
        return structure["value"]
    if kind == "none":
        return None
    if kind in ("dict", "frozen", "state"):
        items = {key: back(child) for key, child in structure["items"]}
        if kind == "dict":
            return items
        module, name = _FROZEN if kind == "frozen" else _STATE
        return getattr(importlib.import_module(module), name)(items)
    if kind in ("list", "tuple"):
        items = [back(child) for child in structure["items"]]
        return items if kind == "list" else tuple(items)
    if kind == "variable":
        cls = getattr(importlib.import_module("flax.nnx"), structure["type"], None)
        if cls is None:
            raise ValueError(f"checkpoint: unknown nnx variable type {structure['type']!r}")
        return cls(back(structure["value"]))
    if kind == "packed":
        return PackedTree.of(back(structure["tree"]))
    children = {name: back(child) for name, child in structure.get("children", {}).items()}
    if kind == "named":
        return _named_class(*structure["type"])(**children)
    if kind == "symbols":
        meta = _COMPRESSED["ClusteredArray"][2](structure["meta"])
        return ClusteredArray(children["codebook"], packed(children["index"], meta["bits"]), **meta)
    if kind == "compressed" and structure["type"] in _COMPRESSED:
        cls, _, from_meta = _COMPRESSED[structure["type"]]
        return cls(**children, **from_meta(structure["meta"]))
    raise ValueError(
        f"checkpoint: unknown node {kind!r} ({structure.get('type')}); it was written by a newer "
        "jaxprune: upgrade"
    )


def _named_class(module: str, qualname: str) -> Any:
    """A named tuple's class: from trusted packages, or from a module that is loaded already."""
    if module.split(".")[0] in _TRUSTED:
        found: Any = importlib.import_module(module)
    else:
        found = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise ValueError(
            f"checkpoint: it holds the named tuple {module}.{qualname}, which is not at hand; "
            f"import {module} before loading"
        )
    return found
