"""Bias correction: biases that make up for what quantization does to the mean of each output."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import Params, PyTree
from jaxprune.calibration._calibrate import stats_leaves
from jaxprune.calibration._stats import Stats
from jaxprune.program import Pair, biases_of, trace_program
from jaxprune.quantize import ActivationQuantized
from jaxprune.scores import per_entry


def correct_biases(
    fn: Callable[..., Any],
    params: Params,
    compressed: PyTree,
    stats: PyTree,
    *args: Any,
    **kwargs: Any,
) -> PyTree:
    """Adds to each bias what compression of its weight takes from the mean output.

    A product `x w + b` with a compressed `w'` gets the bias `b + mean(x) (w - w')`, with the mean input
    that `jp.calibrate` recorded. Works for quantized, pruned and clustered weights alike.

    Args:
      fn: `fn(params, *args, **kwargs)`.
      params: the dense parameters.
      compressed: the same tree compressed.
      stats: of `jp.calibrate` on `params`.
      *args, **kwargs: example inputs; only shapes matter.

    Returns:
      `compressed` with other biases, in their own dtype. Stacked layers of a scan are corrected layer by
      layer; a bias that is compressed, or that several weights share, stays.

    Raises:
      ValueError: trees that differ.

    Warns:
      UserWarning: weights that differ and are not corrected, with the reasons.

    Example:
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> params = {"w": jnp.array([[0.3], [1.0]]), "b": jnp.zeros(1)}
      >>> x = jnp.ones((4, 2))
      >>> small = jp.quantize_tree(params, bits=2, where="w")
      >>> fixed = jp.calibration.correct_biases(fn, params, small, jp.calibrate(fn, params, [x]), x)
      >>> bool(jnp.allclose(jp.compressed(fn)(fixed, x), fn(params, x), atol=1e-4))
      True

    Reference: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction",
    2019, https://arxiv.org/abs/1906.04721
    """
    paths, leaves, _ = _trees.flatten(params)
    names, small, treedef = _trees.flatten(compressed)
    if names != paths:
        odd = sorted(set(names) ^ set(paths))[:3]
        raise ValueError(f"compressed: another tree than params ({odd} differ)")
    found = stats_leaves(stats, paths)
    program = trace_program(fn, params, *args, **kwargs)
    pairs = {pair.weight: pair for pair in biases_of(program, len(leaves))}
    out, kept = list(small), []
    for i, path in enumerate(paths):
        if small[i] is leaves[i] or _trees.rank(small[i]) < 2:
            continue
        lost = _dense(leaves[i]) - _dense(small[i])
        if not bool(jnp.any(lost)):
            continue
        change = _change(pairs.get(i), found[i], lost, small)
        if isinstance(change, str):
            kept.append(f"{path!r} ({change})")
        else:
            bias = pairs[i].bias
            out[bias] = (out[bias] + change).astype(out[bias].dtype)
    if kept:
        more = f" and {len(kept) - 4} more" if len(kept) > 4 else ""
        warnings.warn(f"correct_biases: not corrected: {', '.join(kept[:4])}{more}", stacklevel=2)
    return treedef.unflatten(out)


def _change(pair: Pair | None, stat: Stats, lost: Any, small: list[Any]) -> Any:
    """What is added to the bias of a weight of which `lost` is missing, or why nothing is."""
    if pair is None:
        return "no bias of its own is added to its product"
    bias = small[pair.bias]
    if pair.others:
        return f"it, its product or its bias is read at {', '.join(pair.others)} too"
    if not isinstance(bias, np.ndarray | jax.Array):
        return "its bias is compressed"
    if not stat.axes:
        return "calibration saw nothing multiply it"
    try:
        mean = per_entry("", lost.shape, stat, stat.mean)
    except ValueError:
        return "its features are not those of the statistics"
    missing = jnp.sum(mean * lost, stat.axes)
    if missing.size != bias.size:
        return "its bias has another size than its results"
    return missing.reshape(bias.shape)


def _dense(leaf: Any) -> Any:
    inner = leaf.weight if isinstance(leaf, ActivationQuantized) else leaf
    return jnp.asarray(_trees.dense(inner), jnp.float32)
