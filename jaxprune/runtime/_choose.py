"""Which lowering a product takes.

Measured on CPU (`benchmarks/compressed.py`, `jaxprune tune`): an integer product of 8-bit codes runs
several times faster than a float one, from two rows on, and two planes of activations make it precise and
still faster. Codes that are no integers, or whose scales differ within a sum, become numbers block by
block; with many rows it pays to round those to two planes again. Compilers for GPU and TPU fuse the
conversion of codes into a float product.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._types import CompressedArray
from jaxprune.program import Layout, sized
from jaxprune.quantize import DynamicInput, InputScale, QuantizedArray
from jaxprune.runtime import _lowerings
from jaxprune.runtime._activations import How
from jaxprune.runtime._settle import settled
from jaxprune.share import SELECTED, SELECTED_BYTES, ClusteredArray
from jaxprune.sparse import SparseArray

Leaf = QuantizedArray | ClusteredArray | SparseArray
_INTEGER = ("int8", "int4", "int2")
LONGEST = (2**31 - 1) // (127 * 128)  # products of 8-bit integers that 32 bits hold
_GROUP = 64  # a loop over smaller groups costs more than it saves

Thresholds = dict[str, list[tuple[int, str]]]
"""Per kind of codes: up to so many rows, such a lowering; the last has no bound (-1)."""

DEFAULTS: dict[str, Thresholds] = {
    "cpu": {
        "integers": [(-1, "two_planes")],
        "packed integers": [(-1, "two_planes")],
        "groups of integers": [(32, "groups"), (-1, "block_planes")],
        "other codes": [(32, "blocks"), (-1, "block_planes")],
        "levels": [(-1, "block_planes")],
        "codewords": [(-1, "block_planes")],
        "many codewords": [(16, "blocks"), (-1, "block_planes")],
        "kept values": [(8, "dense"), (-1, "block_planes")],
    },
    "other": {
        "integers": [(-1, "converted")],
        "packed integers": [(-1, "converted")],
        "groups of integers": [(-1, "dense")],
        "other codes": [(-1, "dense")],
        "levels": [(-1, "dense")],
        "codewords": [(-1, "dense")],
        "many codewords": [(-1, "dense")],
        "kept values": [(-1, "dense")],
    },
}

_WHY = {
    "two_planes": "integer products are fastest, the activations in two 8-bit planes",
    "converted": "the compiler fuses the conversion into the product",
    "groups": "few rows: integer products group by group",
    "blocks": "made dense block by block in the cache, and a float product",
    "block_planes": "many rows: made dense block by block, and integer products of 8-bit planes",
    "dense": "the compiler fuses what makes it dense into the product",
}


_WHY_KEPT = {
    "dense": "few rows: what is left of pruned weights is spread faster than it is rounded",
    "blocks": "what is left of pruned weights is spread, and a float product",
    "block_planes": "many rows: what is left is rounded to two 8-bit planes and spread, integer products",
}


class Choice(NamedTuple):
    """How one operation runs on a compressed leaf.

    Attributes:
      path: path of the leaf.
      primitive: the operation.
      shapes: shapes of its operands.
      lowering: a name in `jaxprune.runtime._lowerings`, such as `"two_planes"`; `"rows"` (a look-up of
        compressed rows), `"rounded"` (a dense weight with quantized activations), or `"dense"`: the leaf
        is made dense first.
      why: the reason.
      source: where the program called it.
      dense_bytes: bytes of the dense leaf, where it is made.
    """

    path: str
    primitive: str
    shapes: tuple[tuple[int, ...], ...]
    lowering: str
    why: str
    source: str
    dense_bytes: int


def tuning_file() -> Path:
    """Where `jaxprune tune` keeps what it measured: `JAXPRUNE_TUNING`, or the user's cache folder."""
    given = os.environ.get("JAXPRUNE_TUNING")
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jaxprune" / "tuning.json"


@cache
def thresholds(backend: str) -> Thresholds:
    """Measured ones of this machine, or the defaults."""
    base = DEFAULTS["cpu" if backend == "cpu" else "other"]
    try:
        found = json.loads(tuning_file().read_text())[backend]
        measured = {
            k: [(int(n), str(name)) for n, name in v] for k, v in found.items() if k in base
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return base
    known = all(name in _WHY for rules in measured.values() for _, name in rules)
    return {**base, **measured} if known else base


def kind_of(w: Leaf, layout: Layout) -> tuple[str, str]:
    """The kind of codes, as thresholds name it, and what keeps them from being integers in a product."""
    separated = _lowerings.separated(w, layout)
    if isinstance(w, SparseArray):
        return "kept values", str(separated)
    if isinstance(w, ClusteredArray):
        few = w.clusters <= SELECTED_BYTES and layout.depth <= LONGEST
        if few and not isinstance(separated, str):
            return "packed integers", ""
        reason = separated if isinstance(separated, str) else "many codewords"
        return ("codewords" if w.clusters <= SELECTED else "many codewords"), reason
    if isinstance(separated, str):
        along = w.ndim == 2 and layout.contract == (0,) and w.spec.format in _INTEGER
        worth = along and w.shape[0] // w.scale.shape[0] >= _GROUP
        return ("groups of integers" if worth else "other codes"), separated
    if w.spec.format == "nf4" and separated[0] is None:
        return "levels", "nf4 codes are no integers"
    if w.spec.format not in _INTEGER:
        return "other codes", f"{w.spec.format} codes are no integers"
    if layout.depth > LONGEST:
        return "other codes", f"an integer sum over {layout.depth} products may overflow"
    return ("integers" if w.spec.width == 8 else "packed integers"), ""


def lowering_for(w: Leaf, how: How, layout: Layout) -> tuple[str, str]:
    """A lowering's name and the reason."""
    backend = jax.default_backend()
    kind, reason = kind_of(w, layout)
    integers = kind in ("integers", "packed integers")
    if integers and isinstance(how, DynamicInput) and how.dtype == "int8":
        return "integer", "8-bit activations, one scale per row"
    if integers and isinstance(how, InputScale):
        inner, _ = _lowerings.separated(w, layout)
        if inner is None:
            return "integer", "activations by their calibrated scale"
        return "two_planes", "calibrated activations, times scales of the contracted indices"
    codes = isinstance(w, QuantizedArray)
    both = codes and w.spec.format == "float8_e4m3fn" and how == DynamicInput("float8_e4m3fn")
    factors = _lowerings.separated(w, layout)
    if both and backend != "cpu" and not isinstance(factors, str) and factors[0] is None:
        return "float8", "both operands in float8, one scale per row"
    rules = thresholds(backend)[kind]
    name = next(name for most, name in rules if sized(layout.rows) <= most or most < 0)
    if name == "block_planes" and layout.depth > LONGEST:
        name = "blocks"
    if kind == "kept values" and backend == "cpu":
        return name, _WHY_KEPT[name]
    numbers = (
        codes and w.spec.format != "nf4" and not isinstance(_lowerings.separated(w, layout), str)
    )
    if name == "dense" and numbers:
        name = "converted"
    return name, f"{reason}: {_WHY[name]}" if reason else _WHY[name]


def dense_bytes(array: CompressedArray) -> int:
    """Bytes of the dense array."""
    return int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize


def run(name: str, x: Any, w: Leaf, layout: Layout, how: How) -> jax.Array:
    """A product by its lowering, `x` and result as the lowerings have them.

    Its derivative is that of the product with the dense array.
    """
    compute = lambda x, w, how: settled(getattr(_lowerings, name)(settled(x), w, layout, how))
    reference = lambda x, w, how: _lowerings.dense(x, w, layout, how)
    return differentiated(compute, reference)(x, w, how)


def differentiated(
    compute: Callable[..., jax.Array], reference: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """`compute`, with the derivative of `reference`; what does not move costs nothing."""

    @jax.custom_jvp
    def function(*args: Any) -> jax.Array:
        return compute(*args)

    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        y = function(*primals)
        leaves, tree = jax.tree.flatten(primals)
        directions = jax.tree.leaves(tangents, is_leaf=_is_zero)
        moved = [
            i for i, t in enumerate(directions) if not _is_zero(t) and t.dtype != jax.dtypes.float0
        ]
        if not moved:
            return y, jnp.zeros_like(y)

        def of_moved(*some: Any) -> jax.Array:
            full = list(leaves)
            for i, value in zip(moved, some, strict=True):
                full[i] = value
            return reference(*jax.tree.unflatten(tree, full))

        at, along = ([values[i] for i in moved] for values in (leaves, directions))
        return y, jax.jvp(of_moved, at, along)[1]

    function.defjvp(derivative, symbolic_zeros=True)
    return function


def _is_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)
