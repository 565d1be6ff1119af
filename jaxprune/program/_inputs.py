"""The arguments after the parameters, and a bounded cache of what was traced for them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer


class Inputs(NamedTuple):
    """The arguments after the parameters: arrays, which are traced, and all else, which is not.

    Attributes:
      arrays: arrays, their shapes, and floats, in flatten order.
      names: of each array, as the caller wrote it: `args[0]`, or a keyword.
      static: `(name, value)` for all other arguments.
      shape: structure of the arguments, and shape and dtype of each array.
      rebuild: `arrays -> (args, kwargs)`.
    """

    arrays: list[Any]
    names: tuple[str, ...]
    static: tuple[tuple[str, Any], ...]
    shape: Hashable
    rebuild: Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def key(self) -> Hashable:
        """Tells apart arguments for which a function must be traced anew: static ones by type and value.

        Raises:
          TypeError: a static argument that is not hashable.
        """
        for name, value in self.static:
            try:
                hash(value)
            except TypeError as error:
                raise TypeError(
                    f"{name}: static arguments must be hashable, got {type(value).__name__} ({error}): "
                    "what changes in place cannot be told apart. Freeze it "
                    "(@dataclass(frozen=True), a tuple for a list), or bind it to the function with "
                    "functools.partial"
                ) from None
        return self.shape, tuple((type(x), x) for _, x in self.static), _context()


def is_traced_input(x: Any) -> bool:
    """Whether an argument is traced: arrays, their shapes, and floats. All else keeps its value."""
    return isinstance(x, float) or hasattr(x, "dtype")


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Takes arguments apart. Bools, ints, strings and objects keep their value, as in `train=False`."""
    items, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
    leaves = [x for _, x in items]
    traced = [i for i, x in enumerate(leaves) if is_traced_input(x)]
    fixed = [i for i in range(len(leaves)) if i not in set(traced)]
    arrays = [leaves[i] for i in traced]

    def rebuild(arrays: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        full = list(leaves)
        for i, x in zip(traced, arrays, strict=True):
            full[i] = x
        return jax.tree.unflatten(treedef, full)

    names = [_argument(path) for path, _ in items]
    static = tuple((names[i], leaves[i]) for i in fixed)
    shapes = tuple((np.shape(x), _dtype_of(x), getattr(x, "weak_type", False)) for x in arrays)
    own = tuple(names[i] for i in traced)
    return Inputs(arrays, own, static, (treedef, shapes, tuple(traced)), rebuild)


def _argument(path: tuple[Any, ...]) -> str:
    """An argument as the caller wrote it: `args[0]`, or its keyword, and the place within it."""
    first, second, *rest = path
    name = f"args[{second.idx}]" if first.idx == 0 else str(second.key)
    return name + jax.tree_util.keystr(tuple(rest))


def _dtype_of(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else float


def _context() -> Hashable:
    """Settings that change what is traced."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")
    return (
        *(getattr(jax.config, name) for name in names),
        jax.sharding.get_abstract_mesh(),
    )


class TraceCache:
    """What was traced, by key; beyond `size` entries the least recently used is forgotten."""

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The entry of a key; made, and put, where there is none."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        value = make()
        self.put(key, value)
        return value

    def put(self, key: Hashable, value: Any) -> None:
        """Remembers an entry, unless it holds values of a trace that is under way, which soon end."""
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(_constants(value))):
            return
        self._entries[key] = value
        while len(self._entries) > self.size:
            self._entries.popitem(last=False)


def _constants(value: Any) -> Any:
    """The constants of programs, wherever they are in an entry."""
    if isinstance(value, tuple):
        return [_constants(x) for x in value]
    program = getattr(value, "program", value)
    inner = [p for op in getattr(program, "operations", ()) for p in op.inner]
    return [getattr(program, "constants", {}), [_constants(p) for p in inner]]
