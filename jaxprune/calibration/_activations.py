"""Weights that quantize what multiplies them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import PyTree, Where
from jaxprune.calibration._calibrate import stats_leaves
from jaxprune.calibration._ranges import METHODS, range_of
from jaxprune.quantize import ActivationQuantized, DynamicInput, InputScale, tell_fixed_scales


def quantize_activations(
    tree: PyTree,
    stats: PyTree | None = None,
    bits: int = 8,
    *,
    mode: str | None = None,
    symmetric: bool = True,
    dtype: str = "int8",
    range: str | None = None,
    percentile: float | None = None,
    training: str = "fixed",
    uses: Any = None,
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
      range: what static codes cover: `"absmax"` (by default), `"moving_average"`, `"percentile"` or
        `"mse"`; the last two need `calibrate(..., histogram=True)`.
      percentile: fraction of entries that `range="percentile"` keeps inside, in (0, 1]; 0.9999 by
        default.
      training: the gradient of a static scale: `"fixed"` (none), `"lsq"` or `"pact"`; see `jp.qat`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights; by default what `stats` carry.
      where: which leaves; by default the weights.

    Returns:
      The tree with `jp.quantize.ActivationQuantized` leaves.

    Raises:
      ValueError: statistics missing or of another tree, unknown names, a range that needs a histogram,
        arguments that contradict each other or that the mode does not read.

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
    _refuse_conflicts(mode, stats, bits, symmetric, dtype, range, percentile, training)
    range, percentile = range or "absmax", 0.9999 if percentile is None else percentile
    _checks.choice("range", range, METHODS)
    _checks.choice("training", training, ("fixed", "lsq", "pact"))
    _checks.choice("dtype", dtype, ("int8", "float8_e4m3fn"))
    if bits not in (2, 3, 4, 5, 6, 7, 8):
        raise ValueError(f"bits: expected 2 to 8, got {bits!r}")
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile: expected a fraction in (0, 1], got {percentile}")
    paths, leaves, treedef = _trees.flatten(tree)
    chosen = _trees.select(tree, where, uses=stats if uses is None else uses)
    if mode == "dynamic":
        how = DynamicInput(dtype)
        return treedef.unflatten(
            _with(leaf, how) if hit else leaf for leaf, hit in zip(leaves, chosen, strict=True)
        )
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
    tell_fixed_scales(paths, out)
    return treedef.unflatten(out)


def _refuse_conflicts(
    mode: str,
    stats: PyTree | None,
    bits: int,
    symmetric: bool,
    dtype: str,
    range: str | None,
    percentile: float | None,
    training: str,
) -> None:
    """Raises `ValueError` where arguments contradict the mode or each other."""
    if percentile is not None and range != "percentile":
        raise ValueError(f"percentile, range: {percentile} is read with range='percentile' only")
    if mode == "static":
        if stats is None:
            raise ValueError("stats: static scales need those of calibrate(fn, params, batches)")
        if dtype != "int8":
            raise ValueError(f"dtype: {dtype!r} is for dynamic codes; static ones take bits=")
        return
    given = {
        "stats": stats is not None,
        "bits": bits != 8,
        "symmetric": not symmetric,
        "range": range is not None,
        "training": training != "fixed",
    }
    odd = [name for name, hit in given.items() if hit]
    if odd:
        raise ValueError(
            f"{', '.join(odd)}: dynamic codes are 8 bits with one symmetric scale per row; leave out "
            "what only static ones have, or give stats and mode='static'"
        )


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
