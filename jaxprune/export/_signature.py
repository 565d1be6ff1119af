"""What a function takes and gives, in plain JSON: for files that are read without its code.

Arrays are numbered in flatten order. Containers do not matter for what a function takes: its leaves are
known by argument and path. What it gives is built anew of dicts, lists, tuples, named tuples and
compressed leaves.
"""

import collections
import functools
from typing import Any

import jax
from jax.tree_util import DictKey, SequenceKey

from jaxprune import _leaves, _trees
from jaxprune._types import PyTree
from jaxprune.export._structure import is_variable


def _opened(node: Any) -> list[tuple[Any, Any]]:
    """`(key, child)` of a node, one level down; a leaf is its own child under no key."""
    items, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(path[0] if path else None, child) for path, child in items]


def _known(node: Any) -> _leaves.Node | None:
    known = _leaves.NODES.get(type(node).__name__)
    return known if known is not None and known.cls is type(node) else None


def _name(key: Any) -> str | int:
    if isinstance(key, DictKey):
        return key.key if isinstance(key.key, (str, int)) else str(key.key)
    return getattr(key, "name", getattr(key, "key", getattr(key, "idx", str(key))))


def plain(tree: PyTree) -> PyTree:
    """The tree in dicts, lists and tuples, which any process can read; compressed leaves stay.

    `nnx.State`, `FrozenDict`, named tuples and nodes of other classes become dicts: paths stay the same.
    """
    if is_variable(tree):
        return plain(tree.get_value() if hasattr(tree, "get_value") else tree.value)
    if tree is None or _known(tree):
        return tree
    items = _opened(tree)
    if items and items[0][0] is None:
        return tree
    if type(tree) in (list, tuple):  # with None, which has no leaves
        return type(tree)(plain(x) for x in tree)
    return {_name(key): plain(child) for key, child in items}


def structure_of(node: PyTree) -> dict[str, Any]:
    """The structure of a tree whose leaves are numbers of arrays. Inverse of `built`."""
    known = _known(node)
    if is_variable(node):
        return structure_of(node.get_value() if hasattr(node, "get_value") else node.value)
    if node is None:
        return {"kind": "none"}
    if known is not None:
        children = {name: structure_of(getattr(node, name)) for name in known.data}
        static = {name: _leaves.to_json(getattr(node, name)) for name in known.meta}
        kind = {"kind": "leaf", "type": type(node).__name__}
        return {**kind, "static": static, "children": children}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        items = [[name, structure_of(getattr(node, name))] for name in node._fields]
        return {"kind": "named", "type": type(node).__name__, "items": items}
    if type(node) in (list, tuple):
        return {"kind": type(node).__name__, "items": [structure_of(x) for x in node]}
    items = _opened(node)
    if items and items[0][0] is None:
        return {"kind": "array", "index": int(node)}
    if all(isinstance(key, SequenceKey) for key, _ in items) and isinstance(node, (list, tuple)):
        return {"kind": "list", "items": [structure_of(x) for _, x in items]}
    return {"kind": "dict", "items": [[_name(key), structure_of(x)] for key, x in items]}


def built(structure: dict[str, Any], arrays: list[Any]) -> PyTree:
    """The tree of a structure and its arrays. Inverse of `structure_of`."""
    kind = structure["kind"]
    below = lambda child: built(child, arrays)
    if kind == "none":
        return None
    if kind == "array":
        return arrays[structure["index"]]
    if kind == "leaf":
        children = {name: below(child) for name, child in structure["children"].items()}
        static = {name: _leaves.from_json(x) for name, x in structure["static"].items()}
        return _leaves.NODES[structure["type"]].cls(**children, **static)
    if kind in ("list", "tuple"):
        items = [below(child) for child in structure["items"]]
        return items if kind == "list" else tuple(items)
    items = {name: below(child) for name, child in structure["items"]}
    if kind == "named":
        return _named_tuple(structure["type"], tuple(items))(**items)
    if kind != "dict":
        raise ValueError(f"unknown kind {kind!r}")
    return items


@functools.cache
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """One class for all results, so that loops carry them."""
    return collections.namedtuple(name, fields)


def form_of(leaf: Any) -> Any:
    """What a leaf is besides its arrays: `None` for an array, fields for a compressed one."""
    known = _known(leaf)
    if known is None:
        return None
    static = {name: _leaves.to_json(getattr(leaf, name)) for name in known.meta}
    inner = {
        name: [
            [path, form_of(x)]
            for path, x in zip(*_trees.flatten(getattr(leaf, name))[:2], strict=True)
        ]
        for name in known.data
    }
    return {"type": type(leaf).__name__, "static": static, "children": inner}
