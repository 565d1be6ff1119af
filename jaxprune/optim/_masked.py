"""Fixed masks as an optax transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import _trees
from jaxprune._types import MaskFn, Masks, Params
from jaxprune.masks import PackedTree, masked, resolve


class MaskedState(NamedTuple):
    """State of `masked_update`.

    Attributes:
      masks: tree of bools like the parameters, or a `PackedTree` of them.
      inner_state: state of the wrapped transform.
    """

    masks: Masks
    inner_state: optax.OptState


def masked_update(
    inner: optax.GradientTransformation, masks: Masks | MaskFn, *, packed: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Trains under masks: after every `optax.apply_updates`, masked weights are exactly zero.

    Where masked, the update is `-param`, and `inner` sees a zero gradient and a zero weight, so that
    pruned weights enter neither its moments nor its norms. Nothing else of a training loop changes:
    the masks live in the optimizer state.

    Args:
      inner: any optax transform, such as `optax.adam(1e-3)`.
      masks: tree of bools that broadcasts against the parameters, or a function
        `params -> masks`, called by `init`. `init` copies them: the state may be donated.
      packed: hold masks at one bit per weight instead of one byte.

    Returns:
      A transform whose state is a `MaskedState`.

    Raises:
      ValueError: masks that do not fit the parameters (from `init`); `params` missing (from
        `update`).

    Example:
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> tx = jp.masked_update(optax.sgd(0.1), {"w": jnp.array([True, False])})
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones(2)}, state, params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([0.9, 0. ], dtype=float32)}
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> MaskedState:
        tree = jax.tree.map(lambda m: jnp.array(m, copy=True), resolve(masks, params))
        return MaskedState(PackedTree.of(tree) if packed else tree, inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, MaskedState]:
        params = required(params, "masked_update")
        tree = held_masks(state, params)
        new, inner_state = masked_step(inner, tree, updates, state.inner_state, params, extra)
        return new, MaskedState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def held_masks(state: Any, params: Params | None = None) -> Masks:
    """The masks in a state of this package, unpacked.

    `nnx.Optimizer` hands `init` a state of variables and `update` one of bare arrays: packed masks
    take the containers of `params`.
    """
    return state.masks.unpack(params) if isinstance(state.masks, PackedTree) else state.masks


def required(params: Params | None, name: str) -> Params:
    """The parameters, or an error that says how to hand them over."""
    if params is None:
        raise ValueError(
            f"params: {name} needs the parameters to set masked weights to zero; "
            "call tx.update(grads, state, params)"
        )
    return params


def masked_step(
    inner: optax.GradientTransformationExtraArgs,
    masks: Masks,
    grads: optax.Updates,
    inner_state: optax.OptState,
    params: Params,
    extra: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """A step of `inner` on what the masks leave, and the updates that make the rest zero."""
    keep = lambda tree: _trees.map_with_path(lambda _, x, m: masked(x, m), tree, masks)
    updates, inner_state = inner.update(keep(grads), inner_state, keep(params), **extra)
    updates = _trees.map_with_path(
        lambda _, u, p, m: jnp.where(m, u, (-p).astype(jnp.result_type(u))), updates, params, masks
    )
    return updates, inner_state
