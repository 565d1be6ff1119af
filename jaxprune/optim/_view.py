"""What a network runs on, made of dense parameters by more than a mask.

A view stands in the state of a transform, as a node without leaves: it is data, so that states are saved,
sharded and donated as before, and `jp.optim.sparse_params` finds it there. The gradient that users hand
to `update` is that of the view's values; what reaches parameters and memory is the transform's to say.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import serialization
from jaxtyping import Array

from jaxprune import _trees
from jaxprune._types import Masks, Params
from jaxprune.optim._fit import takes_update

View = Callable[[Params, Masks, dict[str, Any]], Params]
C = TypeVar("C", bound=type)


def view(cls: C) -> C:
    """Register a frozen dataclass `(params, masks, memory) -> params` as a node without leaves."""
    jax.tree_util.register_static(cls)
    serialization.register_serialization_state(
        cls, lambda _: {}, lambda target, _: target, override=True
    )
    return cls


def seen_through(params: Params, values: Params) -> Params:
    """Values whose gradient is handed to the parameters as it is."""
    return _trees.map_with_path(
        lambda _, p, v: _handed_on(p, v) if takes_update(p) else p, params, values
    )


@jax.custom_jvp
def _handed_on(param: Array, value: Array) -> Array:
    del param
    return value


@_handed_on.defjvp
def _handed_on_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
