"""One matrix at a time: ordering, padding to whole blocks, damping and its failures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxprune import _checks
from jaxprune.reconstruct._factor import damped, inverse_factor, is_usable

ORDERS = ("given", "activation")
_LANES = 128  # features per block where nothing asks for another number
_LEAST = 16  # fewer make more steps than they save


def block_size(features: int, group: int) -> int:
    """Features per block: whole groups, or a whole part of one."""
    if not group:
        return min(_LANES, features)
    whole = max(d for d in range(1, min(group, _LANES) + 1) if group % d == 0)
    return whole if whole >= _LEAST else group


def order_of(gram: Float[Array, "features features"], order: str) -> Int[Array, "features"]:
    """In which order features are gone through: as they are, or the most active ones first."""
    if order == "given":
        return jnp.arange(gram.shape[0])
    return jnp.argsort(-jnp.diagonal(gram), stable=True)


@jax.jit
def factor_in_order(
    gram: Float[Array, "features features"], order: Int[Array, "features"]
) -> tuple[Float[Array, "features features"], Bool[Array, ""]]:
    """The factor of features in an order, and whether the gram was positive."""
    u = inverse_factor(gram[order][:, order])
    return u, is_usable(u)


def padded(x: Shaped[Array, "rows outputs"], size: int) -> Shaped[Array, "size outputs"]:
    """Rows of zeros added at the end."""
    return jnp.pad(x, ((0, size - x.shape[0]), (0, 0)))


def padded_factor(u: Float[Array, "n n"], size: int) -> Float[Array, "m m"]:
    """A factor for features that are nowhere and change nothing."""
    n = u.shape[0]
    full = jnp.pad(u, (0, size - n))
    return full + jnp.diag((jnp.arange(size) >= n).astype(u.dtype))


def solved(
    path: str,
    w: Float[Array, "matrices features outputs"],
    gram: Float[Array, "matrices features features"],
    damping: float,
    order: str,
    one: Callable[..., Any],
) -> list[Any]:
    """`one(w, factor, order, number)` of each matrix of a leaf, one after another.

    Each matrix has the memory of its own gram and factor; all have one shape and one compilation.

    Raises:
      ValueError: a gram that is not positive with this damping.
    """
    found = []
    for number in range(w.shape[0]):
        moments = damped(gram[number], damping=damping)
        ranks = order_of(gram[number], order)
        u, usable = factor_in_order(moments, ranks)
        if not _checks.is_traced(usable) and not bool(usable):
            raise ValueError(
                f"damping: the second moment of leaf {path!r} is not positive with damping {damping:g} "
                f"in float32; give more, such as {max(10 * damping, 1e-3):g}, or more batches"
            )
        found.append(one(w[number], u, ranks, number))
    return found


def check_options(damping: float, order: str) -> None:
    """Raises `ValueError` for a damping or an order that is none."""
    _checks.choice("order", order, ORDERS)
    if isinstance(damping, bool) or not np.isfinite(damping) or damping < 0:
        raise ValueError(f"damping: expected a finite number of at least 0, got {damping!r}")
