"""Which rows of a batch count: padding does not."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import _checks

_MASKS = ("mask", "attention_mask", "padding_mask")


def rows_that_count(
    fn: Callable[..., Any], weights: str | Callable[..., Any] | None
) -> Callable[[tuple[Any, ...]], Array | None]:
    """How to find the weights of rows in a batch.

    Raises:
      ValueError: the name of no argument of `fn`.
      TypeError: something that is no name and no function.
    """
    if weights is None:
        return lambda batch: None
    if callable(weights):
        return lambda batch: jnp.asarray(weights(*batch), jnp.float32)
    if not isinstance(weights, str):
        raise TypeError(
            "weights: expected (*batch) -> array, the name of an argument of fn, or None, got "
            f"{type(weights).__name__}"
        )
    names = _arguments(fn)
    if weights != "auto":
        if weights not in names:
            raise ValueError(
                f"weights: fn has no argument {weights!r} after its parameters: {names}"
            )
        at = names.index(weights)

        def named(batch: tuple[Any, ...]) -> Array:
            if at >= len(batch):
                raise ValueError(
                    f"weights: a batch of {len(batch)} has no {weights!r}, argument {at} of fn after its "
                    "parameters; give it in every batch"
                )
            return jnp.asarray(batch[at], jnp.float32)

        return named
    found = [i for i, name in enumerate(names) if name in _MASKS]
    return lambda batch: _mask(batch, names, found[0]) if found else None


def check_weights(weights: Array | None, number: int) -> None:
    """Raises `ValueError` where the weights of a batch are no numbers >= 0 with at least one above."""
    if weights is None or _checks.is_traced(weights):
        return
    host = np.asarray(weights)
    if not (np.isfinite(host).all() and (host >= 0).all() and (host > 0).any()):
        raise ValueError(
            f"weights: of batch {number}, expected finite numbers >= 0, not all 0, got values from "
            f"{host.min(initial=0):g} to {host.max(initial=0):g}"
        )


def _arguments(fn: Callable[..., Any]) -> list[str]:
    """The names of what follows the parameters."""
    try:
        return list(inspect.signature(fn).parameters)[1:]
    except (TypeError, ValueError):
        return []


def _mask(batch: tuple[Any, ...], names: list[str], at: int) -> Array | None:
    """A mask of rows among the arguments: flags with the leading axes of another argument."""
    if at >= len(batch) or not hasattr(batch[at], "dtype"):
        return None
    mask = batch[at]
    shape = tuple(mask.shape)
    flags = mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)
    beside = [
        np.shape(x)[: len(shape)] == shape for i, x in enumerate(batch) if i != at and np.ndim(x)
    ]
    if not flags or not shape or not any(beside):
        return None
    warnings.warn(
        f"calibrate: rows where argument {names[at]!r} is 0 are taken for padding and do not count; "
        f"weights={names[at]!r} says the same without this warning, weights=None counts all",
        stacklevel=2,
    )
    return jnp.asarray(mask != 0, jnp.float32)


def row_weights(
    weights: Array | None,
    x: Float[Array, "*lead rows features"],
    sizes: tuple[int, ...],
    groups: int = 1,
    path: str = "",
) -> Float[Array, "..."]:
    """The weight of each row of an operand.

    Args:
      weights: of the batch's rows, or `None`.
      x: the operand.
      sizes: of the axes that make its rows. Weights belong to the first of them, or to several merged;
        an operand with fewer axes, as after pooling, counts where any of its rows does.
      groups: of a convolution; if above 1, an axis of `x` counts them, and all have the same rows.

    Returns:
      Weights (…, rows), without an axis of groups.
    """
    found = jnp.ones(x.shape[-2], jnp.float32)
    if x.ndim > 2 and groups == 1:  # slots of experts that no token took
        found = jnp.any(x != 0, -1).astype(jnp.float32)
    if weights is None:
        return found
    shape, rows = tuple(weights.shape), x.shape[-2]
    for keep in range(len(shape), 0, -1):
        if sizes[:keep] == shape[:keep] or (sizes and sizes[0] == np.prod(shape[:keep])):
            each = (
                weights if keep == len(shape) else jnp.max(weights, tuple(range(keep, len(shape))))
            )
            return found * jnp.repeat(each.reshape(-1), rows // each.size)
    warnings.warn(
        f"calibrate: all rows of {path!r} count: weights of shape {shape} do not fit the axes {sizes} "
        "of what multiplies it; give weights of its leading axes, or weights=None",
        stacklevel=2,
    )
    return found
