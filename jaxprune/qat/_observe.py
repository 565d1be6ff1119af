"""Ranges of activations that follow training."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxprune import _trees
from jaxprune._types import PyTree
from jaxprune.calibration import ranges_seen, scale_of_range
from jaxprune.quantize import ActivationQuantized, InputScale


def observe(
    fn: Callable[..., Any], tree: PyTree, *args: Any, decay: float = 0.99, **kwargs: Any
) -> PyTree:
    """Moves the input scales of a tree towards the ranges of one batch: moving averages, in training.

    A pure function that jits: call it every few steps, on the batch at hand.

    Args:
      fn: `fn(params, *args, **kwargs)`.
      tree: with leaves of `jp.quantize_activations`.
      *args, **kwargs: a batch.
      decay: weight of the ranges so far, in [0, 1).

    Returns:
      The tree with other input scales; everything else is the same.

    Raises:
      ValueError: a decay out of range, or no leaf with a static input scale.

    Example:
      >>> fn = lambda p, x: x @ p["w"]
      >>> params = {"w": jnp.ones((2, 2))}
      >>> stats = jp.calibrate(fn, params, [jnp.ones((1, 2))])
      >>> tree = jp.quantize_activations(params, stats)
      >>> tree = jp.qat.observe(fn, tree, 3 * jnp.ones((1, 2)), decay=0.5)
      >>> round(float(tree["w"].input.scale) * 127, 3)
      2.0

    Reference: Jacob et al., 2018, section 3.1, https://arxiv.org/abs/1712.05877
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
    paths, leaves, treedef = _trees.flatten(tree)
    static = [
        path
        for path, leaf in zip(paths, leaves, strict=True)
        if isinstance(leaf, ActivationQuantized) and isinstance(leaf.input, InputScale)
    ]
    if not static:
        raise ValueError(
            "tree: no leaf has a static input scale; make them with quantize_activations(tree, stats)"
        )
    seen = ranges_seen(fn, tree, static, *args, **kwargs)
    out = list(leaves)
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if path in static and path in seen:
            out[i] = ActivationQuantized(leaf.weight, _moved(leaf.input, *seen[path], decay))
    return treedef.unflatten(out)


def _moved(how: InputScale, low: Any, high: Any, decay: float) -> InputScale:
    least, most = how.range
    zero = 0.0 if how.zero_point is None else how.zero_point
    symmetric = how.zero_point is None
    before = (least - zero) * how.step, (most - zero) * how.step
    low, high = (low * (low < 0)), (high * (high > 0))
    if symmetric:
        high = abs(high) * (abs(high) >= abs(low)) + abs(low) * (abs(low) > abs(high))
        low = -high
    now = [decay * a + (1 - decay) * b for a, b in zip(before, (low, high), strict=True)]
    moved = scale_of_range(*now, symmetric=symmetric, bits=how.bits, training=how.training)
    return replace(how, scale=moved.scale, zero_point=moved.zero_point)
