"""Masks in and out of an optimizer state, however deep they lie in it, and whether weights obey."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree
from jaxprune.masks import PackedTree
from jaxprune.optim._fit import spread_over, takes_update
from jaxprune.optim._forward import ForwardState, forward_params
from jaxprune.optim._masked import MaskedState, held_masks, keep
from jaxprune.optim._moving import SparseState
from jaxprune.optim._view import seen_through

_HOLDERS = (MaskedState, SparseState, ForwardState)
_EXPECTED = (
    "opt_state: expected the state of one masking transform, found {}; "
    "wrap the optimizer once, with jp.masked_update or jp.optim.gradual"
)


def get_masks(opt_state: optax.OptState) -> Masks:
    """Get the masks in an optimizer state. Inverse of `replace_masks`.

    Args:
      opt_state: a state that holds that of exactly one masking transform of `jp.optim`, at any depth
        (inside `optax.chain`, `TrainState.opt_state`, `nnx.Optimizer`...).

    Returns:
      Tree of bools, unpacked.

    Raises:
      ValueError: no masking transform in the state, or more than one.

    Example:
      >>> masks = {"w": jnp.array([True, False])}
      >>> tx = optax.chain(optax.clip(1.0), jp.masked_update(optax.sgd(0.1), masks))
      >>> jp.optim.get_masks(tx.init({"w": jnp.ones(2)}))
      {'w': Array([ True, False], dtype=bool)}
    """
    return held_masks(holder_of(opt_state))


def replace_masks(opt_state: optax.OptState, masks: Masks) -> optax.OptState:
    """Replace the masks in an optimizer state. Inverse of `get_masks`.

    Weights are not touched: with the next update newly masked ones become zero, and what the inner
    optimizer holds of them is as at its start. So regrown ones start without momentum.

    Args:
      opt_state: a state that holds that of exactly one masking transform.
      masks: tree of bools with the structure of the masks that they replace; each must broadcast
        with its predecessor. They are copied, and packed where the predecessors are.

    Returns:
      A new state.

    Raises:
      ValueError: no masking transform in the state, more than one, or masks that do not fit.

    Example:
      >>> tx = jp.masked_update(optax.sgd(0.1), {"w": jnp.array([True, False])})
      >>> state = tx.init({"w": jnp.ones(2)})
      >>> state = jp.optim.replace_masks(state, {"w": jnp.array([False, True])})
      >>> jp.optim.get_masks(state)
      {'w': Array([False,  True], dtype=bool)}
    """
    holder = holder_of(opt_state)
    if isinstance(holder, ForwardState):
        raise ValueError(
            "opt_state: its masks are made anew of the dense weights, so that others would not last; "
            "use jp.masked_update for masks of your own"
        )
    old = held_masks(holder)
    masks = _checks.aligned("masks", masks, "the masks in opt_state", old)
    full = jax.tree.map(
        lambda o, m: jax.ShapeDtypeStruct(_joint(o.shape, jnp.shape(m)), bool), old, masks
    )
    masks = _checks.masks_fit(masks, full)
    new = jax.tree.map(lambda f, m: jnp.array(jnp.broadcast_to(m, f.shape)), full, masks)
    new = PackedTree.of(new) if isinstance(holder.masks, PackedTree) else new
    return jax.tree.map(
        lambda node: (
            node._replace(masks=new, stale=jnp.array(True)) if isinstance(node, _HOLDERS) else node
        ),
        opt_state,
        is_leaf=lambda node: isinstance(node, _HOLDERS),
    )


def sparse_params(opt_state: optax.OptState, params: Params) -> Params:
    """The parameters that the network runs on: sparse, with straight-through gradients.

    For `jp.optim.straight_through`, `top_kast`, `movement`, `soft_threshold`, `spartan` and `learned_nm`,
    which train dense weights: the loss is that of `sparse_params(opt_state, params)`, and so is the
    network in the end. Differentiate with respect to what it returns, or through it, which is the same:
    the transform knows how that gradient reaches weights, thresholds and logits. For transforms that keep
    pruned weights at zero it changes nothing.

    Args:
      opt_state: a state that holds that of exactly one masking transform.
      params: the parameters.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: no masking transform in the state, more than one, or masks that do not fit.

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> state = jp.optim.straight_through(optax.sgd(0.1), 0.5).init(params)
      >>> jp.optim.sparse_params(state, params)["w"].tolist()
      [[0.0, -2.0], [3.0, 0.0]]
      >>> jax.grad(lambda p: jnp.sum(jp.optim.sparse_params(state, p)["w"]))(params)["w"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    holder = holder_of(opt_state)
    masks = held_masks(holder)
    masks = _checks.masks_fit(masks, params)
    if isinstance(holder, ForwardState):
        return forward_params(holder, params)
    return seen_through(params, keep(params, masks))


def check(opt_state: optax.OptState, params: Params) -> PyTree:
    """Count the pruned weights that are not zero: an error where there are any.

    They come back when something follows the masking transform in a chain or goes around it, when
    parameters are loaded or averaged without masks, or when a weight was infinite. One pass over the
    pruned leaves, under `jit` too: return the counts from the training step, which then costs next
    to nothing more, and look at them outside.

    Args:
      opt_state: a state that holds those of masking transforms, after an update.
      params: the parameters after `optax.apply_updates`.

    Returns:
      Tree like `params`: an int32 scalar for each leaf, 0 for all unless traced.

    Raises:
      ValueError: pruned weights that are not zero (unless traced); no masking transform in the state,
        or one for other parameters.

    Example:
      >>> params, masks = {"w": jnp.ones(2)}, {"w": jnp.array([True, False])}
      >>> tx = optax.chain(jp.masked_update(optax.scale_by_adam(), masks), optax.scale(-0.1))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> jp.optim.check(state, optax.apply_updates(params, updates))
      Traceback (most recent call last):
      ValueError: params: 1 pruned weight of leaf 'w' is not zero...
    """
    counts = jax.tree.map(lambda *n: sum(n), *(_counts(h, params) for h in _holders(opt_state)))
    paths, leaves, _ = _trees.flatten(counts)
    if not any(_checks.is_traced(n) for n in leaves):
        numbers = jax.device_get(leaves)
        found = [(path, int(n)) for path, n in zip(paths, numbers, strict=True) if n]
        if found:
            raise ValueError(_message(found))
    return counts


def _counts(holder: Any, params: Params) -> PyTree:
    if isinstance(holder, ForwardState):
        raise ValueError(
            "opt_state: its transform keeps dense weights, and masks the forward pass only; the sparse "
            "ones are jp.optim.sparse_params(opt_state, params)"
        )
    held = held_masks(holder)
    try:
        masks = spread_over(held, params)
    except ValueError:
        masks = held
    masks = _checks.masks_fit(masks, params)
    return _revived(params, masks)


@jax.jit
def _revived(params: Params, masks: Masks) -> PyTree:
    def count(_: str, param: Any, mask: Any) -> Array:
        if not takes_update(param):
            return jnp.zeros((), jnp.int32)
        return jnp.sum(~mask & (param != 0), dtype=jnp.int32)

    return _trees.map_with_path(count, params, masks)


def _message(found: list[tuple[str, int]]) -> str:
    path, n = found[0]
    more = f", and some of {len(found) - 1} more leaves are not" if len(found) > 1 else ""
    many = "weights" if n > 1 else "weight"
    return (
        f"params: {n} pruned {many} of leaf {path!r} {'are' if n > 1 else 'is'} not zero{more}. Does a "
        "transform follow the masking one in a chain, or go around it? Put the whole optimizer inside: "
        "jp.masked_update(optax.chain(...), masks). Were parameters loaded or averaged? Call "
        "jp.apply_masks(params, jp.optim.get_masks(opt_state))"
    )


def _joint(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(old, new)
    except ValueError:
        return old  # the check that follows says what does not fit


def _holders(opt_state: optax.OptState) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _HOLDERS))
    holders = [node for node in nodes if isinstance(node, _HOLDERS)]
    if not holders:
        raise ValueError(_EXPECTED.format(0))
    return holders


def holder_of(opt_state: optax.OptState) -> Any:
    """The one state of a masking transform in an optimizer state."""
    holders = _holders(opt_state)
    if len(holders) != 1:
        raise ValueError(_EXPECTED.format(len(holders)))
    return holders[0]
