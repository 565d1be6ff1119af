"""Batch normalisations folded into the weights before them."""

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import Params
from jaxprune.calibration._products import Product, products_of
from jaxprune.program import Norm, norms_of, trace_program


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
      The tree with other kernels, statistics, scales and biases. Stacked layers of a scan are folded
      layer by layer.

    Warns:
      UserWarning: a normalisation that cannot be folded (its kernel and the reason), or none at all.

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
    products = {p.path: p for p in products_of(program, paths, leaves)}
    out, kept = list(leaves), []
    norms = norms_of(program, len(leaves))
    for norm in norms:
        reason = _reason(norm, products.get(paths[norm.weight]), leaves)
        if reason:
            kept.append(f"{paths[norm.weight]!r}: {reason}")
        else:
            _fold(out, leaves, norm, products[paths[norm.weight]])
    if kept or not norms:
        none = "no normalisation by running statistics follows a product"
        warnings.warn(f"fold_batch_norm: not folded: {'; '.join(kept) or none}", stacklevel=2)
    return treedef.unflatten(out)


def _reason(norm: Norm, product: Product | None, leaves: list[Any]) -> str:
    """Why a normalisation cannot be folded; empty where it can."""
    if norm.others:
        return f"it, or what it is normalised by, is read at {', '.join(norm.others)} too"
    if norm.bias is None:
        return "the normalisation has no bias to take up its mean"
    shape = np.shape(leaves[norm.weight])
    if product is None or len(product.free) != 1 or product.batch:
        return "its product has no single axis of results"
    lead = shape[: len(shape) - len(product.shape)]
    if shape != (*lead, *product.shape):
        return "it is reshaped before it multiplies"
    size = product.shape[product.free[0]]
    sizes = {np.size(leaves[i]) for i in norm.leaves if i != norm.weight}
    if not sizes <= {size, size * int(np.prod(lead))}:
        return f"{size} channels are normalised by statistics of other sizes"
    return ""


def _fold(out: list[Any], leaves: list[Any], norm: Norm, product: Product) -> None:
    """Moves one normalisation into its kernel; all arrays are taken as (layers…, channels)."""
    weight = jnp.asarray(leaves[norm.weight])
    lead, axis = weight.shape[: weight.ndim - len(product.shape)], product.free[0]

    def layers(position: int | None) -> Any:
        x = leaves[position] if position is not None else jnp.ones(weight.shape[axis])
        own = lead if np.size(x) != weight.shape[axis] else ()
        return jnp.reshape(x, (*own, -1))

    def put(position: int | None, x: Any) -> None:
        if position is None:
            return
        old = leaves[position]
        out[position] = (
            jnp.broadcast_to(x, np.shape(layers(position))).reshape(np.shape(old)).astype(old.dtype)
        )

    gain = layers(norm.scale) / jnp.sqrt(layers(norm.var).astype(jnp.float32) + norm.epsilon)
    place = [1] * len(product.shape)
    place[axis] = -1
    out[norm.weight] = (weight * gain.reshape(*gain.shape[:-1], *place)).astype(weight.dtype)
    put(norm.product_bias, layers(norm.product_bias) * gain)
    put(norm.bias, layers(norm.bias) - layers(norm.mean) * gain)
    put(norm.mean, jnp.zeros(()))
    put(norm.var, jnp.full((), 1.0 - norm.epsilon))
    put(norm.scale, jnp.ones(()))
