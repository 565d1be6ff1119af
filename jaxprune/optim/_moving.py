"""Masks that move: one transform for every rule that says when and how.

A rule is three functions. `start(params)` gives the first masks, `due(step, memory)` says whether they
move at a step, `move(seen)` gives the new ones. They run jitted in the training step, under `lax.cond`,
so that nothing of them is on the path of other steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree
from jaxprune.optim._fit import check_maskable, is_empty
from jaxprune.optim._masked import (
    check_masks,
    emitted,
    keep,
    masked_step,
    refreshed,
    required,
    when,
)


class Changes(NamedTuple):
    """What the masks of a state did so far; `jp.optim.metrics` names it.

    Attributes:
      moves: int32 scalar, how often masks moved.
      last: int32 scalar, the step at which they last moved; -1 before.
      dropped: float32 scalar, weights dropped then.
      regrown: float32 scalar, weights brought back then.
    """

    moves: Int[Array, ""]
    last: Int[Array, ""]
    dropped: Float[Array, ""]
    regrown: Float[Array, ""]


class SparseState(NamedTuple):
    """State of a transform whose masks move, and which keeps pruned weights at zero.

    Attributes:
      step: int32 scalar, updates so far; also `.count`. A field of that name would hide the inner
        optimizer's from `optax.tree.get(state, "count")`.
      masks: tree of bools like the parameters, in the parameter's shape where pruned.
      stale: bool scalar, whether the masks are new to `inner_state` (`replace_masks`).
      memory: what the rule remembers, a dictionary.
      changes: what the masks did so far.
      inner_state: state of the wrapped transform.
    """

    step: Int[Array, ""]
    masks: Masks
    stale: Bool[Array, ""]
    memory: dict[str, Any]
    changes: Changes
    inner_state: optax.OptState

    @property
    def count(self) -> Int[Array, ""]:  # ty: ignore[incompatible-property-override]
        """Updates so far."""
        return self.step


class Seen(NamedTuple):
    """What a rule sees as it moves masks: masks, dense parameters and gradients, memory, step."""

    masks: Masks
    params: Params
    grads: Params
    memory: dict[str, Any]
    step: Int[Array, ""]


@dataclass(frozen=True)
class Rule:
    """When and how masks move.

    Attributes:
      name: the function that users call.
      start: `params -> masks`.
      move: `seen -> (masks, memory)`.
      due: `(step, memory) -> bool`; `None`: the masks never move.
      memory: `params -> dict`, also of the placeholders of `optax.tree.map_params`.
      holds: whether a step that moves masks applies no gradient.
      fresh: `(params, memory, step) -> params`, values of weights that are brought back; zero without.
      reach: `seen -> (grads, memory)`, every step: what `inner` gets in place of the gradients.
    """

    name: str
    start: Callable[[Params], Masks]
    move: Callable[[Seen], tuple[Masks, dict[str, Any]]] | None = None
    due: Callable[[Array, dict[str, Any]], Any] | None = None
    memory: Callable[[Params], dict[str, Any]] = lambda _: {}
    holds: bool = False
    fresh: Callable[..., Params] | None = None
    reach: Callable[[Seen], tuple[Params, dict[str, Any]]] | None = None


def moving(
    inner: optax.GradientTransformation, rule: Rule
) -> optax.GradientTransformationExtraArgs:
    """Train under masks that a rule moves: pruned weights are zero after every update."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> SparseState:
        if is_empty(params):
            return _state(params, rule.memory(params), inner.init(params))
        masks = started(rule, params)
        return _state(masks, rule.memory(params), inner.init(keep(params, masks)))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, SparseState]:
        params = required(params, rule.name)
        check_masks(state.masks, params)
        due = jnp.array(False) if rule.due is None else rule.due(state.step, state.memory)
        masks, memory, changes = moved(rule, due, state, params, updates)
        before = refreshed(inner, state.inner_state, due | state.stale, masks, params, state.masks)
        grads = updates
        if rule.reach is not None:
            grads, memory = rule.reach(Seen(masks, params, updates, memory, state.step))
        new, after = masked_step(inner, masks, grads, before, params, extra)
        if rule.holds:
            still = _trees.map_with_path(lambda _, u: jnp.where(due, jnp.zeros_like(u), u), new)
            new = emitted(params, still, masks)
            after = jax.tree.map(lambda a, b: jnp.where(due, a, b), before, after)
        if rule.fresh is not None:
            new = _planted(rule, due, new, params, state.masks, masks, (memory, state.step))
        step = jnp.asarray(optax.safe_increment(state.step))
        return new, SparseState(step, masks, jnp.array(False), memory, changes, after)

    return optax.GradientTransformationExtraArgs(init, update)


def started(rule: Rule, params: Params) -> Masks:
    """The first masks of a rule, checked, placed like the parameters."""
    masks = rule.start(params)
    check_maskable(params, masks)
    if not any(m.ndim for m in jax.tree.leaves(masks)):
        raise ValueError(
            f"where: selects no leaf, so {rule.name} would prune nothing; name the leaves, such as "
            f"where='.*'. Behind optax.flatten wrap the other way: {rule.name}(optax.flatten(inner), …)"
        )
    return _trees.map_with_path(_placed_like, params, masks)


def moved(
    rule: Rule, due: Any, state: Any, params: Params, grads: Params
) -> tuple[Masks, dict[str, Any], Changes]:
    """Masks, memory and log after a step, moved if due."""
    if rule.move is None:
        return state.masks, state.memory, state.changes
    move = rule.move

    def change(masks: Masks, memory: Any, changes: Changes) -> tuple[Masks, Any, Changes]:
        new, memory = move(Seen(masks, params, grads, memory, state.step))
        new = jax.tree.map(lambda m, old: jnp.broadcast_to(m, old.shape), new, masks)
        return new, memory, _logged(changes, masks, new, state.step)

    return when(due, change, lambda *same: same, state.masks, state.memory, state.changes)


def no_changes() -> Changes:
    """The log before the first step."""
    zero = lambda: jnp.zeros((), jnp.float32)
    return Changes(jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32), zero(), zero())


def _logged(changes: Changes, old: Masks, new: Masks, step: Array) -> Changes:
    pairs = list(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    total = lambda flag: jnp.sum(flag, dtype=jnp.int32).astype(jnp.float32)
    count = lambda flags: jnp.sum(jnp.stack([total(flag) for flag in flags]))
    dropped = count(a & ~b for a, b in pairs)
    regrown = count(~a & b for a, b in pairs)
    return Changes(changes.moves + 1, jnp.asarray(step, jnp.int32), dropped, regrown)


def _state(masks: Masks, memory: Any, inner_state: Any) -> SparseState:
    zero = jnp.zeros((), jnp.int32)
    return SparseState(zero, masks, jnp.array(False), memory, no_changes(), inner_state)


def _placed_like(_: str, param: Any, mask: Any) -> Any:
    if _checks.is_traced(param) or _checks.is_traced(mask) or not isinstance(param, jax.Array):
        return mask
    return jax.device_put(mask, param.sharding) if mask.shape == param.shape else mask


def _planted(
    rule: Rule, due: Any, updates: PyTree, params: Params, old: Masks, new: Masks, given: Any
) -> PyTree:
    """The updates, with fresh values for weights that are brought back."""

    def plant(updates: PyTree) -> PyTree:
        values = rule.fresh(params, *given)  # ty: ignore[not-callable]
        put = lambda _, u, v, p, a, b: jnp.where(b & ~a, (v - p).astype(u.dtype), u)
        return _trees.map_with_path(put, updates, values, params, old, new)

    return when(due, plant, lambda same: same, updates)
