"""Optimizers for trees that hold more than floats."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._types import Params


def trainable(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Train the floats of a tree with integers and bools in it, such as clusters' indices or masks.

    `inner` sees floating leaves only; the others get updates of zero, so that `optax.apply_updates`
    leaves them as they are. Gradients come from `jax.grad(loss, allow_int=True)`.

    Args:
      inner: any optax transform.

    Returns:
      A transform for the whole tree.

    Example:
      >>> tree = jp.cluster_tree({"w": jnp.array([[0.0, 1.0], [1.0, 3.0]])}, clusters=3)
      >>> tx = jp.optim.trainable(optax.sgd(0.5))
      >>> loss = lambda t: jnp.sum(t["w"].materialize())
      >>> grads = jax.grad(loss, allow_int=True)(tree)
      >>> updates, _ = tx.update(grads, tx.init(tree), tree)
      >>> optax.apply_updates(tree, updates)["w"].materialize().tolist()
      [[0.0, 0.0], [0.0, 2.5]]
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> Any:
        return inner.init(_floats(params))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        leaves, treedef = jax.tree.flatten(updates)
        like = leaves if params is None else jax.tree.leaves(params)
        held = None if params is None else _floats(params)
        new, state = inner.update(_floats(updates), state, held, **extra)
        moved = iter(jax.tree.leaves(new))
        return treedef.unflatten(
            next(moved) if _is_float(u) else jnp.zeros(jnp.shape(p), _dtype(p))
            for u, p in zip(leaves, like, strict=True)
        ), state

    return optax.GradientTransformationExtraArgs(init, update)


def _dtype(x: Any) -> Any:
    dtype = jnp.result_type(x)
    return jnp.bool_ if dtype in (jax.dtypes.float0, jnp.bool_) else dtype


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _floats(tree: Any) -> Any:
    """The tree without what is no float: `None` in its place."""
    return jax.tree.map(lambda x: x if _is_float(x) else None, tree)
