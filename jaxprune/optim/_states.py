"""What optimizer states hold of weights that masks dropped or brought back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._types import Masks, Params, is_compressed
from jaxprune.program import Kind, primitive


def reset_entries(
    state: optax.OptState, fresh: optax.OptState, stays: Masks, params: Params
) -> optax.OptState:
    """Give the entries of some weights the values that they have in a `fresh` state.

    A leaf of the state belongs to a parameter if its key path holds that parameter's (the last one
    that fits) and its shape ends in the parameter's: moments, averages, copies and histories of any
    optimizer, also behind `optax.masked`, `multi_transform` and `inject_hyperparams`. A leaf that
    belongs to none and is as long as all parameters together is that of `optax.flatten`.

    Args:
      state: of any optax transform.
      fresh: what the transform's `init` returns for `params`.
      stays: tree of bools; True where entries stay as they are.
      params: the parameters, masked.

    Returns:
      A state like `state`.
    """
    fast = lambda tree: tree.fast if isinstance(tree, optax.LookaheadParams) else tree
    params, stays = fast(params), fast(stays)
    items, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    found = zip(items, treedef.flatten_up_to(stays), strict=True)
    owners = {path: (jnp.shape(p), m) for (path, p), m in found}
    if not any(jnp.ndim(m) for _, m in owners.values()):
        return state
    size = sum(jnp.size(p) for p in jax.tree.leaves(params))

    def reset(path: Any, old: Any, new: Any) -> Any:
        shape = jnp.shape(old)
        mask = _mask_of(path, shape, owners)
        if mask is None and shape[-1:] == (size,):
            mask = jnp.concatenate([jnp.broadcast_to(m, s).ravel() for s, m in owners.values()])
        if mask is None or not mask.ndim:
            return old
        return jnp.where(mask, old, jnp.asarray(new, jnp.result_type(old)))

    return jax.tree_util.tree_map_with_path(reset, state, fresh)


# what a fusion computes as it reads, without a pass of its own
_FUSED = (Kind.IDENTITY, Kind.CAST, Kind.ELEMENTWISE, Kind.VIEW, Kind.OPENED)


def is_elementwise(init: Callable[[Params], optax.OptState], params: Params) -> bool:
    """Whether a state begins as constants and as elementwise functions of the parameters."""

    def plain(jaxpr: Any) -> bool:
        inner = (getattr(eqn.params.get("jaxpr"), "jaxpr", None) for eqn in jaxpr.eqns)
        known = all(primitive(eqn.primitive.name).kind in _FUSED for eqn in jaxpr.eqns)
        return known and all(plain(x) for x in inner if x is not None)

    return plain(jax.make_jaxpr(init)(params).jaxpr)


def _mask_of(path: Any, shape: tuple[int, ...], owners: dict[Any, Any]) -> jax.Array | None:
    lengths = sorted({len(owner) for owner in owners}, reverse=True)
    for end in range(len(path), -1, -1):
        for length in lengths:
            owned, mask = owners.get(tuple(path[max(end - length, 0) : end]), (None, None))
            if owned is not None and shape[len(shape) - len(owned) :] == owned:
                return mask
    return None
