"""Dense weights that train under masks of the forward pass only.

The optimizer holds and moves dense weights; the network runs on `sparse_params(opt_state, params)`, whose
gradient is handed to the transform as it is. What reaches the weights is the rule's to say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxprune import _trees
from jaxprune._types import Masks, Params
from jaxprune.optim._fit import is_empty, takes_update
from jaxprune.optim._masked import check_masks, keep, required
from jaxprune.optim._moving import Changes, Rule, Seen, moved, no_changes, started
from jaxprune.optim._view import View, seen_through


class ForwardState(NamedTuple):
    """State of a transform whose masks hold in the forward pass only: the weights stay dense.

    Attributes:
      step: int32 scalar, updates so far; also `.count`, see `SparseState`.
      masks: tree of bools like the parameters: those of the next forward pass.
      memory: what the rule remembers, a dictionary.
      changes: what the masks did so far.
      inner_state: state of the wrapped transform.
      view: what the network runs on where that is more than masked weights; holds no arrays.
    """

    step: Int[Array, ""]
    masks: Masks
    memory: dict[str, Any]
    changes: Changes
    inner_state: optax.OptState
    view: Any = None

    @property
    def count(self) -> Int[Array, ""]:  # ty: ignore[incompatible-property-override]
        """Updates so far."""
        return self.step


@dataclass(frozen=True)
class ForwardRule(Rule):
    """A `Rule` whose masks hold in the forward pass only.

    Attributes:
      free: `(masks, memory) -> tree of bools`: which weights may move; `None`: all.
      view: what the forward pass sees; `None`: masked weights.
    """

    free: Callable[[Masks, dict[str, Any]], Masks] | None = None
    view: View | None = None


def forward(
    inner: optax.GradientTransformation, rule: ForwardRule
) -> optax.GradientTransformationExtraArgs:
    """Train dense weights; masks for the next forward pass are made of the weights after each step."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> ForwardState:
        masks = params if is_empty(params) else started(rule, params)
        zero = jnp.zeros((), jnp.int32)
        memory, inner_state = rule.memory(params), inner.init(params)
        return ForwardState(zero, masks, memory, no_changes(), inner_state, rule.view)

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ForwardState]:
        params = required(params, rule.name)
        check_masks(state.masks, params)
        grads, memory = updates, state.memory
        if rule.reach is not None:
            grads, memory = rule.reach(Seen(state.masks, params, grads, memory, state.step))
        new, inner_state = inner.update(grads, state.inner_state, params, **extra)
        if rule.free is not None:
            free = rule.free(state.masks, memory)
            new = _trees.map_with_path(_only_where, new, free)
        step = jnp.asarray(optax.safe_increment(state.step))
        seen = ForwardState(step, state.masks, memory, state.changes, inner_state)
        due = jnp.array(False) if rule.due is None else rule.due(step, memory)
        after = optax.apply_updates(params, new)
        masks, memory, changes = moved(rule, due, seen, after, updates)
        return new, ForwardState(step, masks, memory, changes, inner_state, rule.view)

    return optax.GradientTransformationExtraArgs(init, update)


def forward_params(state: ForwardState, params: Params) -> Params:
    """What the network runs on, with gradients that are handed on to all parameters."""
    still = jax.lax.stop_gradient(params)
    if state.view is None:
        return seen_through(params, keep(still, state.masks))
    return seen_through(params, state.view(still, state.masks, state.memory))


def _only_where(_: str, update: Any, free: Any) -> Any:
    return jnp.where(free, update, jnp.zeros_like(update)) if takes_update(update) else update
