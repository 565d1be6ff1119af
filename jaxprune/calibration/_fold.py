"""Batch normalisations folded into the weights before them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxprune import _trees
from jaxprune._types import Params
from jaxprune.calibration._products import products_of
from jaxprune.program import Program, norms_of, trace_program


def fold_batch_norm(fn: Callable[..., Any], params: Params, *args: Any, **kwargs: Any) -> Params:
    """Moves the scales of batch normalisations into the kernels before them; `fn` computes the same.

    The kernel of each convolution or product whose result a normalisation by running statistics reads is
    multiplied, channel by channel, by `scale / sqrt(var + epsilon)`. The normalisation is left with mean
    0, variance `1 - epsilon`, scale 1 and what remains as its bias, so that the same `fn` runs on the new
    parameters, and quantization sees the weights as they act.

    Args:
      fn: `fn(params, *args, **kwargs)` in inference mode; `params` holds the running statistics too.
      params: any tree of arrays.
      *args, **kwargs: example inputs; only shapes matter.

    Returns:
      The tree with other kernels, statistics, scales and biases; the same where nothing can be folded.

    Example:
      >>> def fn(p, x):
      ...     y = (x @ p["w"] - p["mean"]) * (p["scale"] * jax.lax.rsqrt(p["var"] + 1e-5)) + p["bias"]
      ...     return jax.nn.relu(y)
      >>> params = {"w": jnp.ones((3, 2)), "mean": jnp.ones(2), "var": jnp.array([4.0, 1.0]),
      ...           "scale": jnp.array([2.0, 6.0]), "bias": jnp.zeros(2)}
      >>> folded = jp.calibration.fold_batch_norm(fn, params, jnp.ones((1, 3)))
      >>> jnp.round(folded["w"], 2)[0].tolist(), folded["scale"].tolist()
      ([1.0, 6.0], [1.0, 1.0])

    Reference: Jacob et al., 2018, section 3.2, https://arxiv.org/abs/1712.05877
    """
    paths, leaves, treedef = _trees.flatten(params)
    program = trace_program(fn, params, *args, **kwargs)
    outputs = _output_axes(program, paths, leaves)
    out = list(leaves)
    for norm in norms_of(program, len(leaves)):
        axis = outputs.get(paths[norm.weight])
        if axis is None or norm.bias is None:
            continue
        weight, mean, var = (jnp.asarray(leaves[i]) for i in (norm.weight, norm.mean, norm.var))
        gain = 1.0 / jnp.sqrt(var.astype(jnp.float32) + norm.epsilon)
        if norm.scale is not None:
            gain = gain * leaves[norm.scale]
        if gain.size != weight.shape[axis]:
            continue
        if norm.scale is not None:
            out[norm.scale] = jnp.ones_like(leaves[norm.scale])
        shape = [1] * weight.ndim
        shape[axis] = -1
        out[norm.weight] = (weight * gain.reshape(shape)).astype(weight.dtype)
        if norm.product_bias is not None:
            before = leaves[norm.product_bias]
            out[norm.product_bias] = (before * gain).astype(before.dtype)
        bias = leaves[norm.bias]
        out[norm.bias] = (bias - mean * gain).astype(bias.dtype)
        out[norm.mean] = jnp.zeros_like(mean)
        out[norm.var] = jnp.full_like(var, 1.0 - norm.epsilon)
    return treedef.unflatten(out)


def _output_axes(program: Program, paths: list[str], leaves: list[Any]) -> dict[str, int]:
    """Of each weight with one axis of results, that axis, counted from the end."""
    products = products_of(program, paths, leaves)
    return {p.path: p.free[0] for p in products if len(p.free) == 1 and not p.batch}
