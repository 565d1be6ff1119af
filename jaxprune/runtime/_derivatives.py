"""Derivatives of products that are computed otherwise than they are differentiated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def differentiated(
    compute: Callable[..., jax.Array], reference: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """`compute`, with the derivative of `reference`; what does not move costs nothing."""

    @jax.custom_jvp
    def function(*args: Any) -> jax.Array:
        return compute(*args)

    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        y = function(*primals)
        leaves, tree = jax.tree.flatten(primals)
        directions = jax.tree.leaves(tangents, is_leaf=_is_zero)
        moved = [
            i for i, t in enumerate(directions) if not _is_zero(t) and t.dtype != jax.dtypes.float0
        ]
        if not moved:
            return y, jnp.zeros_like(y)

        def of_moved(*some: Any) -> jax.Array:
            full = list(leaves)
            for i, value in zip(moved, some, strict=True):
                full[i] = value
            return reference(*jax.tree.unflatten(tree, full))

        at, along = ([values[i] for i in moved] for values in (leaves, directions))
        return y, jax.jvp(of_moved, at, along)[1]

    function.defjvp(derivative, symbolic_zeros=True)
    return function


def _is_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)
