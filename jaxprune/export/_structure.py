"""The structure of a tree as plain JSON, and back, so that loading needs no template.

Arrays are numbered; everything else stands in the structure itself. Known nodes: dict, list, tuple,
None, named tuples, Flax `FrozenDict` and `nnx.State`, and registered dataclasses, compressed leaves
first of all. Names in files are looked up in lists of classes, never imported or called.
"""

import dataclasses
import importlib
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import _bits, _leaves
from jaxprune._types import PyTree, is_compressed
from jaxprune.masks import PackedTree
from jaxprune.share import ClusteredArray
from jaxprune.structure import CompactFunction

_LARGE = 1024  # bytes of arrays that are compared with others
_FROZEN = ("flax.core", "FrozenDict")
_STATE = ("flax.nnx", "State")
_LISTED = ("optax", "optax.contrib", "chex", "jaxprune.optim", "jaxprune.distill")
_named: dict[str, type] = {}
"""Named tuples that were registered or saved, by full name."""


def register(cls: type) -> type:
    """Lets `save` and `load` take a class of yours: a dataclass that is a pytree node, or a named tuple.

    Args:
      cls: a named tuple, or a dataclass registered with JAX. Its static fields are marked as JAX marks
        them, `field(metadata={"static": True})`, and hold numbers, strings, dtypes or tuples of those.
        Dataclasses go through `jax.export` too, as arguments of a serialized function.

    Returns:
      The class, so that this is a decorator.

    Raises:
      TypeError: neither of the two.
      ValueError: another class of its name is registered.

    Example:
      >>> import dataclasses
      >>> @jp.export.register
      ... @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True)
      ... class Signs:
      ...     signs: jax.Array
      ...     scale: jax.Array
      ...     axis: int = dataclasses.field(metadata={"static": True}, default=-1)
    """
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        _named[_full_name(cls)] = cls
    elif dataclasses.is_dataclass(cls):
        fields = dataclasses.fields(cls)
        meta = [f.name for f in fields if f.metadata.get("static")]
        _leaves.add(cls, [f.name for f in fields if f.name not in meta], meta)
    else:
        raise TypeError(f"cls: expected a named tuple or a dataclass, got {cls.__name__}")
    return cls


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


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
    name = type(node).__name__
    known = _leaves.NODES.get(name)
    if known is not None and known.cls is type(node):
        static = {field: _leaves.to_json(getattr(node, field)) for field in known.meta}
        if arrays.symbols and isinstance(node, ClusteredArray):
            children = {"codebook": node.codebook, "index": node.index()}
        else:
            children = {field: getattr(node, field) for field in known.data}
        items = {field: below(field, child) for field, child in children.items()}
        return {"kind": "leaf", "type": name, "static": static, "children": items}
    if isinstance(node, CompactFunction):
        return {"kind": "compact", "sizes": below("sizes", node.sizes())}
    if isinstance(node, jax.ShapeDtypeStruct):
        return {"kind": "struct", "shape": [*node.shape], "dtype": node.dtype.name}
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
        register(type(node))
        fields = {f: below(f, getattr(node, f)) for f in node._fields}
        return {"kind": "named", "type": _full_name(type(node)), "children": fields}
    if type(node) in (list, tuple):
        items = [below(i, child) for i, child in enumerate(node)]
        return {"kind": type(node).__name__, "items": items}
    if is_variable(node):
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


def is_variable(node: Any) -> bool:
    return _is(node, "flax.nnx", "Variable")


def decode(structure: dict[str, Any], arrays: list[Any]) -> PyTree:
    """The tree of a structure and its arrays. Inverse of `encode`.

    Raises:
      ValueError: a structure of an unknown kind, a class that is not at hand, or children that do not fit
        their node. What is malformed raises what Python raises.
    """
    return _DECODERS[structure["kind"]](structure, arrays)


def _array(structure: dict[str, Any], arrays: list[Any]) -> Any:
    index = structure["index"]
    if type(index) is not int or not 0 <= index < len(arrays):
        raise ValueError(f"array {index!r} of {len(arrays)}")
    return arrays[index]


def _value(structure: dict[str, Any], arrays: list[Any]) -> Any:
    value = structure["value"]
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"{type(value).__name__} as a value")
    return value


def _mapping(structure: dict[str, Any], arrays: list[Any]) -> Any:
    items = {key: decode(child, arrays) for key, child in structure["items"]}
    if len(items) != len(structure["items"]) or not all(type(k) in (str, int) for k in items):
        raise ValueError("keys that are no strings or integers, or come twice")
    if structure["kind"] == "dict":
        return items
    module, name = _FROZEN if structure["kind"] == "frozen" else _STATE
    return getattr(importlib.import_module(module), name)(items)


def _sequence(structure: dict[str, Any], arrays: list[Any]) -> Any:
    items = [decode(child, arrays) for child in structure["items"]]
    return items if structure["kind"] == "list" else tuple(items)


def _variable(structure: dict[str, Any], arrays: list[Any]) -> Any:
    nnx = importlib.import_module("flax.nnx")
    classes = {
        name: cls
        for name, cls in vars(nnx).items()
        if isinstance(cls, type) and issubclass(cls, nnx.Variable)
    }
    if structure["type"] not in classes:
        raise ValueError(f"unknown nnx variable {structure['type']!r}")
    return classes[structure["type"]](decode(structure["value"], arrays))


def _packed_tree(structure: dict[str, Any], arrays: list[Any]) -> Any:
    return PackedTree.of(decode(structure["tree"], arrays))


def _compact(structure: dict[str, Any], arrays: list[Any]) -> CompactFunction:
    return CompactFunction.from_sizes(decode(structure["sizes"], arrays))


def _struct(structure: dict[str, Any], arrays: list[Any]) -> jax.ShapeDtypeStruct:
    shape = structure["shape"]
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"a shape of {shape}")
    return jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(structure["dtype"]))


def _children(structure: dict[str, Any], arrays: list[Any]) -> dict[str, Any]:
    return {name: decode(child, arrays) for name, child in structure["children"].items()}


def _leaf(structure: dict[str, Any], arrays: list[Any]) -> Any:
    known = _leaves.NODES.get(structure["type"])
    if known is None:
        raise ValueError(
            f"unknown leaf {structure['type']!r}; register its class before loading "
            "(jp.export.register), or upgrade"
        )
    children = _children(structure, arrays)
    static = {name: _leaves.from_json(value) for name, value in structure["static"].items()}
    if "index" in children and known.cls is ClusteredArray:
        index = children.pop("index")
        children["indices"] = _bits.pack_planes(index, static["bits"], static["axis"])
    if set(children) != set(known.data) or set(static) != set(known.meta):
        raise ValueError(f"{structure['type']} with other fields")
    leaf = known.cls(**children, **static)
    if is_compressed(leaf) and hasattr(leaf, "check"):
        leaf.check()
    return leaf


def _named_tuple(structure: dict[str, Any], arrays: list[Any]) -> Any:
    name = structure["type"]
    cls = _named.get(name) or _listed().get(name)
    if cls is None:
        raise ValueError(
            f"it holds the named tuple {name}, which is not at hand; register its class before loading: "
            "jp.export.register"
        )
    return cls(**_children(structure, arrays))


def _listed() -> dict[str, type]:
    """The named tuples that known packages offer, by full name; none is imported that is not loaded."""
    found = [x for name in _LISTED for x in vars(sys.modules.get(name, object)).values()]
    tuples = [x for x in found if isinstance(x, type) and issubclass(x, tuple)]
    return {_full_name(cls): cls for cls in tuples if hasattr(cls, "_fields")}


_DECODERS: dict[str, Callable[[dict[str, Any], list[Any]], Any]] = {
    "array": _array,
    "value": _value,
    "none": lambda structure, arrays: None,
    "dict": _mapping,
    "frozen": _mapping,
    "state": _mapping,
    "list": _sequence,
    "tuple": _sequence,
    "variable": _variable,
    "packed": _packed_tree,
    "compact": _compact,
    "struct": _struct,
    "leaf": _leaf,
    "named": _named_tuple,
}
