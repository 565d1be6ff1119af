"""Weights that quantize what multiplies them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import PyTree, Where
from jaxprune.calibration._calibrate import stats_leaves
from jaxprune.calibration._ranges import METHODS, range_of
from jaxprune.quantize import ActivationQuantized, DynamicInput, InputScale


def quantize_activations(
    tree: PyTree,
    stats: PyTree | None = None,
    bits: int = 8,
    *,
    mode: str | None = None,
    symmetric: bool = True,
    dtype: str = "int8",
    range: str = "absmax",
    percentile: float = 0.9999,
    training: str = "fixed",
    where: Where = None,
) -> PyTree:
    """Lets weights say how what multiplies them is quantized when `jp.compressed` runs them.

    With statistics, one known scale per weight (static): no work at run time. Without, one scale per row
    (token), as rows come (dynamic).

    Args:
      tree: dense or quantized leaves.
      stats: of `jp.calibrate` on the same tree; weights that multiplied nothing stay as they are.
      bits: of static codes, 2 to 8.
      mode: `"static"` or `"dynamic"`; by default static if there are `stats`.
      symmetric: static codes in `[-q, q]` without a zero point; else the whole range with one, which
        activations that are never negative (after a ReLU) use fully.
      dtype: of dynamic codes: `"int8"` or `"float8_e4m3fn"`.
      range: what static codes cover: `"absmax"`, `"moving_average"`, `"percentile"` or `"mse"`; the last
        two need `calibrate(..., histogram=True)`.
      percentile: fraction of entries that `"percentile"` keeps inside, in (0, 1].
      training: the gradient of a static scale: `"fixed"` (none), `"lsq"` or `"pact"`; see `jp.qat`.
      where: which leaves; by default floating leaves with two axes or more.

    Returns:
      The tree with `jp.quantize.ActivationQuantized` leaves.

    Raises:
      ValueError: statistics missing or of another tree, unknown names, a range that needs a histogram.

    Example:
      >>> params = {"w": jnp.ones((3, 2))}
      >>> fn = lambda p, x: x @ p["w"]
      >>> stats = jp.calibrate(fn, params, [jnp.array([[1.0, -2.0, 0.5]])])
      >>> tree = jp.quantize_activations(jp.quantize_tree(params), stats)
      >>> round(float(tree["w"].input.scale) * 127, 3)
      2.0

    References: Jacob et al., 2018, https://arxiv.org/abs/1712.05877; Dettmers et al., LLM.int8(), 2022,
    https://arxiv.org/abs/2208.07339 (scales per row)
    """
    mode = mode or ("dynamic" if stats is None else "static")
    _checks.choice("mode", mode, ("static", "dynamic"))
    _checks.choice("range", range, METHODS)
    _checks.choice("training", training, ("fixed", "lsq", "pact"))
    _checks.choice("dtype", dtype, ("int8", "float8_e4m3fn"))
    if bits not in (2, 3, 4, 5, 6, 7, 8):
        raise ValueError(f"bits: expected 2 to 8, got {bits!r}")
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile: expected a fraction in (0, 1], got {percentile}")
    paths, leaves, treedef = _trees.flatten(tree)
    chosen = _trees.select(tree, where)
    if mode == "dynamic":
        how = DynamicInput(dtype)
        return treedef.unflatten(
            _with(leaf, how) if hit else leaf for leaf, hit in zip(leaves, chosen, strict=True)
        )
    if stats is None:
        raise ValueError("stats: static scales need those of calibrate(fn, params, batches)")
    found = stats_leaves(stats, paths)
    out = list(leaves)
    for i, (path, leaf, hit, stat) in enumerate(zip(paths, leaves, chosen, found, strict=True)):
        if not hit or not np.any(np.asarray(stat.count)):
            continue
        if range in ("percentile", "mse") and stat.histogram is None:
            raise ValueError(
                f"range: {range!r} needs a histogram, and {path!r} has none; calibrate with "
                "histogram=True"
            )
        ends = range_of(stat, range, symmetric=symmetric, bits=bits, percentile=percentile)
        out[i] = _with(
            leaf, scale_of_range(*ends, symmetric=symmetric, bits=bits, training=training)
        )
    return treedef.unflatten(out)


def scale_of_range(low: Any, high: Any, *, symmetric: bool, bits: int, training: str) -> InputScale:
    """The scale, and zero point, that map a range to codes."""
    q = 2 ** (bits - 1) - 1
    if symmetric:
        top = jnp.asarray(high, jnp.float32)
        return InputScale(jnp.where(top == 0, 1.0, top / q), None, bits, training)
    width = jnp.asarray(high, jnp.float32) - jnp.asarray(low, jnp.float32)
    scale = jnp.where(width == 0, 1.0, width / (2**bits - 1))
    return InputScale(scale, jnp.round(-(q + 1) - jnp.asarray(low) / scale), bits, training)


def _with(leaf: Any, how: InputScale | DynamicInput) -> ActivationQuantized:
    return ActivationQuantized(leaf.weight if isinstance(leaf, ActivationQuantized) else leaf, how)
