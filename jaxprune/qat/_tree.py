"""Whole trees into quantization-aware training and out of it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree, Where
from jaxprune.qat._array import FIRST, QATArray
from jaxprune.quantize import (
    ActivationQuantized,
    InputScale,
    Misfits,
    Rules,
    Spec,
    has_parts,
    scale_of,
    specs_for,
    tell_fixed_scales,
)


def prepare(
    params: Params,
    bits: int = 8,
    *,
    method: str = "lsq",
    symmetric: bool = True,
    group_size: int | None = None,
    otherwise: str = "auto",
    dtype: Any = None,
    granularity: str = "channel",
    masks: Masks | None = None,
    rules: Rules | None = None,
    uses: Any = None,
    where: Where = None,
) -> PyTree:
    """Replaces weights by leaves that train on their quantized values.

    Train the tree like any other: `jp.compressed(fn)` runs it, gradients and optimizers see its arrays,
    all of them floats that train,
    and `convert` makes the quantized tree, which gives the same outputs. For activations, put
    `jp.quantize_activations(tree, stats, training="lsq")` around it.

    Args:
      params: any tree of arrays; leaves of `jp.quantize_activations` keep their input scales.
      bits, symmetric, group_size, otherwise, dtype, granularity: see `jp.quantize.Spec`.
      method: `"lsq"`: steps are learned with the weights, from `2 mean|w| / sqrt(q)` on (integers only);
        `"absmax"`: the weight's range in each step.
      masks: pruned weights stay exactly 0, through training and quantization: they get no gradient, and
        0 is how they are told apart.
      rules, uses, where: see `jp.quantize_tree`.

    Returns:
      The tree with `QATArray` leaves.

    Raises:
      ValueError: unknown names, learned steps for `"nf4"` or `"float8_e4m3fn"`, a group size that does
        not divide a leaf where `otherwise="error"`, masks of another tree.

    Warns:
      UserWarning: leaves that groups do not divide, and what became of them; input scales
        that are fixed, beside weights that train: decay would move them.

    Example:
      >>> params = {"w": jnp.array([[0.9, -0.4], [0.2, 0.7]])}
      >>> fn = lambda p, x: x @ p["w"]
      >>> tree = jp.qat.prepare(params, bits=4)
      >>> grads = jax.grad(lambda t: jnp.sum(jp.compressed(fn)(t, jnp.ones((1, 2)))))(tree)
      >>> grads["w"].value.shape, grads["w"].step.shape
      ((2, 2), (1, 2))

    Reference: Esser et al., "Learned Step Size Quantization", 2020, https://arxiv.org/abs/1902.08153
    """
    _checks.choice("method", method, ("lsq", "absmax"))
    base = Spec(
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        otherwise=otherwise,
        dtype=dtype,
        granularity=granularity,
    )
    misfits = Misfits()
    specs = specs_for(params, base, rules, where, uses, misfits)
    paths, leaves, treedef = _trees.flatten(params)
    if masks is None:
        kept: list[Any] = [None] * len(leaves)
    else:
        names = _trees.leaf_paths(masks)
        if names != paths:
            odd = sorted(set(names) ^ set(paths))[:3]
            raise ValueError(f"masks: another tree than params ({odd} differ)")
        kept = jax.tree.leaves(masks)
    for path, spec in zip(paths, specs, strict=True):
        if spec is not None and method == "lsq" and spec.dtype is not None:
            raise ValueError(
                f"method: {spec.format} of leaf {path!r} has no step to learn; use 'absmax'"
            )
    out = []
    for path, leaf, spec, mask in zip(paths, leaves, specs, kept, strict=True):
        one = partial(_prepared, path=path, mask=mask, method=method, misfits=misfits)
        if spec is None:
            out.append(leaf)
        elif isinstance(leaf, ActivationQuantized):
            out.append(leaf.with_weight(one(leaf.weight, spec)))
        else:
            out.append(one(leaf, spec))
    misfits.tell()
    tell_fixed_scales(paths, out)
    return treedef.unflatten(out)


def _prepared(leaf: Any, spec: Spec, *, path: str, mask: Any, method: str, misfits: Misfits) -> Any:
    if has_parts(leaf):  # codebooks and factors train in its stead
        one = partial(_prepared, path=path, mask=None, method=method, misfits=misfits)
        return leaf.quantized(one, spec)
    known = misfits.fit(spec, path, leaf)
    if known is None:
        return leaf
    spec = known
    value = jnp.array(_trees.dense(leaf))  # a copy: training may donate it
    pruned = mask is not None and jnp.ndim(mask) > 0
    if pruned:  # what is kept is not 0, however small, so that 0 means pruned
        least = jnp.finfo(value.dtype).smallest_normal
        value = jnp.where(mask, jnp.where(value == 0, least, value), 0)
    if method == "absmax":
        return QATArray(value, None, spec, pruned)
    shape = scale_of(value, spec)[0].shape
    return QATArray(value, jnp.full(shape, FIRST, jnp.float32), spec, pruned)


def convert(tree: PyTree) -> PyTree:
    """The quantized tree of a trained one: `QuantizedArray` for each `QATArray`, fixed input scales.

    Args:
      tree: of `prepare`, trained or not.

    Returns:
      The tree, which gives the same outputs under `jp.compressed`.

    Example:
      >>> tree = jp.qat.prepare({"w": jnp.array([[0.9, -0.4], [0.2, 0.7]])}, bits=4)
      >>> small = jp.qat.convert(tree)
      >>> bool(jnp.array_equal(small["w"].materialize(), tree["w"].materialize()))
      True
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, ActivationQuantized):
            how = leaf.input
            how = how.fixed() if isinstance(how, InputScale) else how
            return ActivationQuantized(one(leaf.weight), how)
        return leaf.converted() if isinstance(leaf, QATArray) else leaf

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, (QATArray, ActivationQuantized)))
