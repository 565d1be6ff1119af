"""Biases that make up for what quantization does to the mean of each output."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import Params, PyTree
from jaxprune.calibration._calibrate import stats_leaves
from jaxprune.program import biases_of, trace_program
from jaxprune.quantize import ActivationQuantized


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
      `compressed` with other biases, in their own dtype; a bias that is compressed, or that several
      weights share, stays.

    Raises:
      ValueError: trees that differ.

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
    out = list(small)
    for weight, bias in biases_of(program, len(leaves)).items():
        stat = found[weight]
        if _trees.rank(small[weight]) == 0 or not stat.axes or np.ndim(stat.count):
            continue
        if not isinstance(out[bias], (np.ndarray, jnp.ndarray)):
            continue
        was = jnp.asarray(_trees.dense(leaves[weight]), jnp.float32)
        now = _dense(small[weight])
        sizes = [was.shape[i] for i in stat.axes]
        if int(np.prod(sizes)) != stat.mean.size:
            continue
        missing = jnp.tensordot(
            stat.mean.reshape(sizes), was - now, (tuple(range(len(sizes))), stat.axes)
        )
        if missing.size == out[bias].size:
            change = missing.reshape(out[bias].shape)
            out[bias] = (out[bias] + change).astype(out[bias].dtype)
    return treedef.unflatten(out)


def _dense(leaf: Any) -> Any:
    inner = leaf.weight if isinstance(leaf, ActivationQuantized) else leaf
    return jnp.asarray(_trees.dense(inner), jnp.float32)
