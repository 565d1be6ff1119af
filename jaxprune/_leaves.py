"""One registration per kind of compressed leaf: with JAX, with `jax.export`, and for files.

A leaf is a frozen dataclass; some of its fields are children (arrays, or trees of them), the others are
static. One codec turns static fields into JSON and back, for files and for `jax.export` alike. Names that
files hold are looked up in `NODES` and `VALUES`, never imported.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

T = TypeVar("T", bound=type)


class Node(NamedTuple):
    """A registered class.

    Attributes:
      cls: the class.
      data, meta: names of its children and of its static fields.
    """

    cls: type
    data: tuple[str, ...]
    meta: tuple[str, ...]


NODES: dict[str, Node] = {}
"""Registered nodes, by name."""

VALUES: dict[str, type] = {}
"""Dataclasses that static fields may hold, by name."""


def register(*, data: Sequence[str], meta: Sequence[str] = ()) -> Callable[[T], T]:
    """A decorator: makes a dataclass a pytree node, and known to files and `jax.export`."""

    def decorate(cls: T) -> T:
        jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=list(meta))
        add(cls, data, meta)
        return cls

    return decorate


def add(cls: type, data: Sequence[str], meta: Sequence[str], name: str | None = None) -> None:
    """Makes a pytree node that JAX knows known to files and `jax.export`."""
    name = name or cls.__name__
    known = NODES.get(name)
    full_name = lambda cls: (cls.__module__, cls.__qualname__)
    if known is not None and full_name(known.cls) != full_name(cls):
        raise ValueError(f"cls: another class is registered as {name!r}; rename one of them")
    NODES[name] = Node(cls, tuple(data), tuple(meta))
    if known is not None:  # the same class defined anew, as in notebooks
        return
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxprune.{name}",
        serialize_auxdata=lambda aux: json.dumps([to_json(value) for value in aux]).encode(),
        deserialize_auxdata=lambda text: tuple(from_json(value) for value in json.loads(text)),
        from_children=lambda aux_data, children: cls(
            **dict(zip(data, children, strict=True)), **dict(zip(meta, aux_data, strict=True))
        ),
    )


def register_value(cls: T) -> T:
    """A decorator: lets static fields hold this dataclass."""
    VALUES[cls.__name__] = cls
    return cls


def to_json(value: Any) -> Any:
    """A static field as JSON. Inverse of `from_json`.

    Raises:
      TypeError: a value of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, tuple):
        return {"tuple": [to_json(v) for v in value]}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if VALUES.get(type(value).__name__) is type(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"value": type(value).__name__, "fields": fields}
    raise TypeError(
        f"static field: {type(value).__name__} does not go to files; expected None, a bool, a number, a "
        "string, a dtype, or a tuple of those"
    )


def from_json(value: Any) -> Any:
    """A static field of JSON. Inverse of `to_json`."""
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(from_json(v) for v in value["tuple"])
    if "dtype" in value:
        return jnp.dtype(value["dtype"])
    return VALUES[value["value"]](**{k: from_json(v) for k, v in value["fields"].items()})
