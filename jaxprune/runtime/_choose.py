"""Which lowering a product takes."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune._trees import is_few
from jaxprune._types import CompressedArray
from jaxprune.program import Layout
from jaxprune.quantize import DynamicInput, InputScale
from jaxprune.runtime._activations import How
from jaxprune.runtime._lowerings import LOWERINGS
from jaxprune.runtime._rules import INTEGERS, Kind, rule_of
from jaxprune.runtime._tuning import Thresholds

_WHY_NM = {
    "dense": "what is left of pruned weights is spread faster than it is rounded",
    "blocked": "what is left of pruned weights is spread, and a float product",
    "blocked_int8_split": "what is left is split in two int8 parts and spread",
}


class Settings(NamedTuple):
    """How a function runs.

    Attributes:
      activations: how activations of leaves without a scale of their own are quantized.
      platform: where the program will run.
      thresholds: which lowering is fastest there.
    """

    activations: How
    platform: str
    thresholds: Thresholds


class Choice(NamedTuple):
    """How one operation runs on a compressed leaf.

    Attributes:
      path: path of the leaf.
      primitive: the operation.
      shapes: shapes of its operands.
      lowering: a name in `jaxprune.runtime.LOWERINGS`, such as `"int8_split"`; `"rows"` (a look-up of
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


def lowering_for(w: Any, how: How, layout: Layout, settings: Settings) -> tuple[str, str]:
    """A lowering's name and the reason."""
    rule = rule_of(w)
    kind, reason = rule.kind(w, layout)
    factors = rule.factored_scales(w, layout)
    inner = None if isinstance(factors, str) else factors[0]
    if kind in INTEGERS and isinstance(how, DynamicInput) and how.dtype == "int8":
        return "integer", "8-bit activations, one scale per row"
    if kind in INTEGERS and isinstance(how, InputScale):
        if inner is None:
            return "integer", "activations by their calibrated scale"
        return "int8_split", "calibrated activations, times scales of the contracted indices"
    both = how == DynamicInput("float8_e4m3fn") and LOWERINGS["float8"].fits(w, layout)
    if both and settings.platform != "cpu" and inner is None:
        return "float8", LOWERINGS["float8"].why
    rules = settings.thresholds[kind]
    name = next(name for most, name in rules if most < 0 or is_few(layout.rows, most))
    while not LOWERINGS[name].fits(w, layout):
        name = LOWERINGS[name].otherwise
    if kind == Kind.NM_VALUE and settings.platform == "cpu" and name in _WHY_NM:
        return name, _WHY_NM[name]
    why = LOWERINGS[name].why
    return name, f"{reason}: {why}" if reason else why


def dense_bytes(array: CompressedArray) -> int:
    """Bytes of the dense array."""
    return int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize
