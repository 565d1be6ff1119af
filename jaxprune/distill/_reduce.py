"""Checks and reductions that losses share.

Losses take the student first. Sums run in float32 whatever the inputs, so that bf16 is safe. `where`
is a mask of examples (or tokens), broadcasting against the values that are reduced; what it leaves out
counts neither in the sum nor in the mean, and has gradient 0 whatever it holds, NaN and infinities too:
losses mask their inputs, since masking values alone leaves `0 * nan` on the way back.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune import _checks

REDUCTIONS = ("mean", "sum", "none")


def reduced(values: Float[Array, "..."], reduction: str, where: Any = None) -> Float[Array, "..."]:
    """The mean, sum, or all of some values, of those that `where` keeps."""
    _checks.choice("reduction", reduction, REDUCTIONS)
    where = counted(where, values.shape)
    if where is not None:
        values = jnp.where(where, values, 0.0)
    if reduction == "none":
        return values
    total = jnp.sum(values)
    if reduction == "sum":
        return total
    count = values.size if where is None else jnp.sum(where)
    return total / jnp.maximum(count, 1)


def counted(where: Any, shape: tuple[int, ...]) -> Bool[Array, "..."] | None:
    """The mask in the shape of the values that it is for; `None` stays."""
    if where is None:
        return None
    where = jnp.asarray(where).astype(bool)
    try:
        fits = np.broadcast_shapes(where.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"where: shape {where.shape} does not broadcast to the values' {tuple(shape)}; "
            "mask examples (tokens), without the axis of classes or features"
        )
    return jnp.broadcast_to(where, shape)


def only(where: Any, *arrays: Array, fill: float = 0.0) -> list[Array]:
    """Arrays with `fill` where a mask, broadcasting against them, leaves entries out."""
    if where is None:
        return list(arrays)
    return [jnp.where(where, x, fill) for x in arrays]


def wide(*arrays: Any) -> list[Array]:
    """Arrays in float32, or wider."""
    return [
        jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32)) for x in arrays
    ]


def same_classes(s: Any, t: Any, axis: int) -> None:
    """Checks that student and teacher have logits of one shape."""
    if jnp.ndim(s) == 0 or jnp.ndim(t) == 0:
        raise ValueError("student, teacher: expected logits with a class axis, got scalars")
    if s.shape[axis] != t.shape[axis]:
        raise ValueError(
            f"teacher: {t.shape[axis]} classes along axis {axis}, the student has {s.shape[axis]}; "
            "select the classes that both have"
        )
    same_shapes(s, t)


def same_shapes(s: Any, t: Any) -> None:
    """Checks that student and teacher have features of one shape."""
    if s.shape != t.shape:
        raise ValueError(
            f"teacher: shape {t.shape}, the student has {s.shape}; bring them together with a projector, "
            "such as jp.distill.dense_projector or conv_projector"
        )


def same_batch(s: Any, t: Any) -> None:
    """Checks that student and teacher saw the same number of examples."""
    if s.shape[0] != t.shape[0]:
        raise ValueError(
            f"teacher: a batch of {t.shape[0]}, the student has {s.shape[0]}; give both the same examples"
        )


def flat(x: Any) -> Array:
    """(batch, everything else)."""
    return x.reshape(x.shape[0], -1)


def safe_norm(x: Array, axis: Any, *, keepdims: bool = False) -> Array:
    """The Euclidean norm, with gradient 0 at 0."""
    squares = jnp.sum(jnp.square(x), axis, keepdims=keepdims)
    zero = squares == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


def normalized(x: Array, axis: Any, *, least: float = 1e-12) -> Array:
    """`x` over its Euclidean norm along some axes, which counts as at least `least`."""
    return x / jnp.maximum(safe_norm(x, axis, keepdims=True), least)


def smooth_l1(difference: Array) -> Array:
    """Huber's loss with threshold 1."""
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * difference * difference, size - 0.5)


def frozen(x: Any) -> Any:
    """What the teacher says: no gradient."""
    return jax.lax.stop_gradient(x)
