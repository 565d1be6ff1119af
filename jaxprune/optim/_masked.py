"""Fixed masks as an optax transform."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from jaxprune import _checks, _trees
from jaxprune._types import MaskFn, Masks, Params
from jaxprune.masks import PackedTree, masked
from jaxprune.optim._fit import fitted, is_empty, takes_update
from jaxprune.optim._states import is_elementwise, reset_entries


class MaskedState(NamedTuple):
    """State of `masked_update`.

    Attributes:
      masks: tree of bools like the parameters, or a `PackedTree` of them.
      stale: bool scalar, whether the masks are new to `inner_state` (`replace_masks`).
      inner_state: state of the wrapped transform.
    """

    masks: Masks
    stale: Bool[Array, ""]
    inner_state: optax.OptState


def masked_update(
    inner: optax.GradientTransformation, masks: Masks | MaskFn, *, packed: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Train under masks: after every `optax.apply_updates`, masked weights are exactly zero.

    Where masked, the update is `-param`, in the dtype that gradients and parameters promote to;
    `inner` sees zero gradients and zero weights from `init` on, and its state there begins as that of a
    zero weight, again with every change of masks: pruned weights enter neither moments nor norms, and
    start anew when `replace_masks` brings them back. Nothing else of a training loop changes: the masks
    live in the optimizer state.

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
            return MaskedState(params, jnp.array(False), inner.init(params))
        tree = jax.tree.map(lambda m: jnp.array(m, copy=True), fitted(masks, params))
        held = PackedTree.of(tree) if packed else tree
        return MaskedState(held, jnp.array(False), inner.init(keep(params, tree)))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, MaskedState]:
        params = required(params, "masked_update")
        tree = held_masks(state, params)
        check_masks(tree, params)
        inner_state = refreshed(inner, state.inner_state, state.stale, tree, params)
        new, inner_state = masked_step(inner, tree, updates, inner_state, params, extra)
        return new, MaskedState(state.masks, jnp.array(False), inner_state)

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


def check_masks(masks: Masks, params: Params) -> None:
    """Raises where the masks of a state are not those of the parameters, as after a wrong resume."""
    paths, leaves, treedef = _trees.flatten(params)
    try:
        found = treedef.flatten_up_to(masks)
    except ValueError as error:
        raise ValueError(
            "opt_state: its masks have another structure than params; resume into the state of the "
            f"same parameters and transform ({error})"
        ) from None
    for path, leaf, mask in zip(paths, leaves, found, strict=True):
        _checks.broadcasts("the masks in opt_state", path, jnp.shape(mask), jnp.shape(leaf))


def when(flag: Any, f: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """`lax.cond`, or the branch itself where the flag is known: eager calls compile nothing anew."""
    if _checks.is_traced(flag):
        return jax.lax.cond(flag, f, other, *args)
    return f(*args) if bool(flag) else other(*args)


def refreshed(
    inner: optax.GradientTransformationExtraArgs,
    inner_state: optax.OptState,
    stale: Any,
    masks: Masks,
    params: Params,
    old: Masks | None = None,
) -> optax.OptState:
    """The state of `inner` after a change of masks: only entries kept before and after stay.

    Where `inner.init` is elementwise, as nearly always, entries are selected, which costs next to nothing
    beside the step that reads them anyway; a branch would copy the state. Other states are reset in one.
    """

    def reset(state: optax.OptState, flag: Any = True) -> optax.OptState:
        weights = keep(params, masks)
        both = masks if old is None else jax.tree.map(jnp.logical_and, old, masks)
        if flag is not True:
            both = jax.tree.map(lambda m: m | ~flag if jnp.ndim(m) else m, both)
        return reset_entries(state, inner.init(weights), both, weights)

    if _checks.is_traced(stale) and is_elementwise(inner.init, params):
        return reset(inner_state, stale)
    return when(stale, reset, lambda state: state, inner_state)


def masked_step(
    inner: optax.GradientTransformationExtraArgs,
    masks: Masks,
    grads: optax.Updates,
    inner_state: optax.OptState,
    params: Params,
    extra: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """A step of `inner` on what the masks leave, and the updates that make the rest zero."""
    fast = isinstance(params, optax.LookaheadParams) and not isinstance(
        grads, optax.LookaheadParams
    )
    kept_grads = keep(grads, masks.fast if fast else masks)
    updates, inner_state = inner.update(kept_grads, inner_state, keep(params, masks), **extra)
    return emitted(params, updates, masks), inner_state


def emitted(params: Params, updates: optax.Updates, masks: Masks) -> optax.Updates:
    """The updates, `-param` where masked."""
    return _trees.map_with_path(_emitted, params, updates, masks)


def keep(tree: Params, masks: Masks) -> Params:
    """The tree with zeros where masked; leaves that hold no floats stay as they are."""
    return _trees.map_with_path(lambda _, x, m: masked(x, m) if takes_update(x) else x, tree, masks)


def _emitted(_: str, param: Any, update: Any, mask: Any) -> Any:
    # in the promoted dtype: -param rounded to a half-precision update would leave a rest
    return jnp.where(mask, update, -param) if takes_update(param) else update
