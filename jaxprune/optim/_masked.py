"""Fixed masks as an optax transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import _trees
from jaxprune._types import MaskFn, Masks, Params
from jaxprune.masks import PackedTree, masked
from jaxprune.optim._fit import fitted, is_empty, takes_update
from jaxprune.optim._states import reset_pruned


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
    """Train under masks: after every `optax.apply_updates`, masked weights are exactly zero.

    Where masked, the update is `-param`, in the dtype that gradients and parameters promote to;
    `inner` sees zero gradients and zero weights from `init` on, and its state there is that of a fresh
    zero weight, so that pruned weights enter neither moments nor norms, and start anew when
    `replace_masks` brings them back. Nothing else of a training loop changes: the masks live in the
    optimizer state.

    Warning: this goes around the whole optimizer, learning rate included. What follows it in
    `optax.chain` (a learning rate, weight decay, noise) or goes around it (`optax.lookahead`) changes
    `-param` and revives pruned weights; `jp.optim.check` finds them. Write
    `masked_update(optax.chain(a, b), masks)` instead of `chain(masked_update(a, masks), b)`.

    Args:
      inner: any optax transform, such as `optax.adam(1e-3)`.
      masks: tree of bools that broadcasts against the parameters, or a function
        `params -> masks`, called by `init`. `init` copies them: the state may be donated.
      packed: hold masks at one bit per weight instead of one byte.

    Returns:
      A transform whose state is a `MaskedState`.

    Raises:
      ValueError: masks that do not fit the parameters, an infinite weight where masked (from
        `init`); `params` missing (from `update`).
      TypeError: a mask for a compressed leaf or for integers (from `init`).

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
        if is_empty(params):  # a placeholder of `optax.tree.map_params`
            return MaskedState(params, inner.init(params))
        tree = jax.tree.map(lambda m: jnp.array(m, copy=True), fitted(masks, params))
        return MaskedState(PackedTree.of(tree) if packed else tree, inner.init(keep(params, tree)))

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
    weights = keep(params, masks)
    inner_state = reset_pruned(inner_state, inner.init(weights), masks, weights)
    fast = isinstance(params, optax.LookaheadParams) and not isinstance(
        grads, optax.LookaheadParams
    )
    kept_grads = keep(grads, masks.fast if fast else masks)
    updates, inner_state = inner.update(kept_grads, inner_state, weights, **extra)
    return _trees.map_with_path(_emitted, params, updates, masks), inner_state


def keep(tree: Params, masks: Masks) -> Params:
    """The tree with zeros where masked; leaves that hold no floats stay as they are."""
    return _trees.map_with_path(lambda _, x, m: masked(x, m) if takes_update(x) else x, tree, masks)


def _emitted(_: str, param: Any, update: Any, mask: Any) -> Any:
    # in the promoted dtype: -param rounded to a half-precision update would leave a rest
    return jnp.where(mask, update, -param) if takes_update(param) else update
