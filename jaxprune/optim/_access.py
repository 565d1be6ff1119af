"""Masks in and out of an optimizer state, however deep they lie in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import _checks
from jaxprune._types import Masks
from jaxprune.masks import PackedTree
from jaxprune.optim._gradual import GradualState
from jaxprune.optim._masked import MaskedState, held_masks

_HOLDERS = (MaskedState, GradualState)


def get_masks(opt_state: optax.OptState) -> Masks:
    """The masks in an optimizer state. Inverse of `replace_masks`.

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
    return held_masks(_only(opt_state))


def replace_masks(opt_state: optax.OptState, masks: Masks) -> optax.OptState:
    """The same state with other masks. Inverse of `get_masks`.

    Weights are not touched: newly masked ones become zero with the next update.

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
    holder = _only(opt_state)
    old = held_masks(holder)
    _checks.same_structure("masks", masks, "the masks in opt_state", old)
    full = jax.tree.map(
        lambda o, m: jax.ShapeDtypeStruct(_joint(o.shape, jnp.shape(m)), bool), old, masks
    )
    _checks.masks_fit(masks, full)
    new = jax.tree.map(lambda f, m: jnp.array(jnp.broadcast_to(m, f.shape)), full, masks)
    new = PackedTree.of(new) if isinstance(holder.masks, PackedTree) else new
    return jax.tree.map(
        lambda node: node._replace(masks=new) if isinstance(node, _HOLDERS) else node,
        opt_state,
        is_leaf=lambda node: isinstance(node, _HOLDERS),
    )


def _joint(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(old, new)
    except ValueError:
        return old  # the check that follows says what does not fit


def _only(opt_state: optax.OptState) -> Any:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _HOLDERS))
    holders = [node for node in nodes if isinstance(node, _HOLDERS)]
    if len(holders) != 1:
        raise ValueError(
            f"opt_state: expected the state of one masking transform, found {len(holders)}; "
            "wrap the optimizer once, with jp.masked_update or jp.optim.gradual"
        )
    return holders[0]
