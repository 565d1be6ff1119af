"""Ranges of weights made alike by scalings that a function does not feel."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Params
from jaxprune.calibration._scalings import (
    Scaling,
    apply_factors,
    holds,
    ranges,
    scalings_of,
    with_scaled,
)
from jaxprune.graph import trace

_SETTLED = 1e-3  # logarithm of a factor


def equalize(
    fn: Callable[..., Any], params: Params, *args: Any, sweeps: int = 10, **kwargs: Any
) -> Params:
    """Cross-layer equalisation: channels of neighbouring layers scaled against each other, so that the
    ranges of weights within a tensor differ less; `fn` computes the same.

    Where a channel `c` of one weight may be divided by `s` if another is multiplied by it, both get the
    range `sqrt(r1 r2)`. Which may, is found from the gradients of the traced function, whatever lies
    between (ReLU, pooling, depthwise convolutions, gates, attention), and tried out, so that there is
    nothing to annotate. Weights with one scale per tensor gain most. Fold batch normalisations first.

    Args:
      fn: `fn(params, *args, **kwargs)`, differentiable.
      params: any tree of arrays.
      *args, **kwargs: real inputs, a few examples: the scalings are looked for and checked on them.
      sweeps: how often all scalings are gone through; fewer where ranges have settled.

    Returns:
      The tree with other weights and biases.

    Warns:
      UserWarning: nothing can be scaled.

    Example:
      >>> fn = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
      >>> params = {"w1": jnp.array([[1.0, 0.01]]), "w2": jnp.array([[1.0], [100.0]])}
      >>> even = jp.calibration.equalize(fn, params, jnp.ones((1, 1)))
      >>> jnp.round(even["w1"], 3).tolist(), jnp.round(even["w2"], 3).tolist()
      ([[1.0, 1.0]], [[1.0], [1.0]])

    Reference: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction",
    2019, https://arxiv.org/abs/1906.04721
    """
    _checks.positive_int("sweeps", sweeps)
    graph = trace(fn, params, *args, **kwargs)
    _, leaves, treedef = _trees.flatten(params)
    call = jax.jit(lambda leaves: fn(treedef.unflatten(leaves), *args, **kwargs))
    wide = [np.asarray(x, np.float32) if _trees.is_floating(x) else x for x in leaves]
    both = (s for s in scalings_of(graph, call, leaves) if s.weights(1) and s.weights(-1))
    found = [s for s in both if holds(call, leaves, wide, s)]
    if not found:
        names = ", ".join(repr(group.name) for group in graph.groups[:4]) or "none"
        warnings.warn(
            "equalize: nothing is scaled: no scaling of a group of units leaves the outputs as they are; "
            f"groups: {names}",
            stacklevel=2,
        )
        return params
    for _ in range(sweeps):
        moved = [_balance(wide, scaling) for scaling in found]
        if max(moved) < _SETTLED:
            break
    return treedef.unflatten(with_scaled(leaves, wide, found))


def _balance(leaves: list[Any], scaling: Scaling) -> float:
    """Scales both sides to equal ranges, in place; how far, as a logarithm."""
    size = scaling.size
    a, b = (ranges(leaves, scaling.weights(sign), size) for sign in (1, -1))
    known = (a > 0) & (b > 0)
    logs = 0.5 * np.log(np.where(known, b, 1.0) / np.where(known, a, 1.0))
    apply_factors(leaves, scaling, np.exp(logs))
    return float(np.abs(logs).max(initial=0.0))
