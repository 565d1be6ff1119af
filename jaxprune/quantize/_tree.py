"""Whole trees to quantized leaves and back."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax

from jaxprune import _trees
from jaxprune._types import Params, PyTree, Where, is_compressed
from jaxprune.quantize._array import QuantizedArray, quantize, refuse_non_finite
from jaxprune.quantize._misfits import Misfits
from jaxprune.quantize._spec import Spec

Rules = Sequence[tuple[str, Spec | int | None]]


def quantize_tree(
    params: Params,
    bits: int = 8,
    *,
    symmetric: bool = True,
    group_size: int | None = None,
    otherwise: str = "auto",
    dtype: Any = None,
    granularity: str = "channel",
    channel_axis: int | tuple[int, ...] | None = None,
    group_axis: int | None = None,
    rules: Rules | None = None,
    uses: Any = None,
    where: Where = None,
) -> PyTree:
    """Quantize weights to `QuantizedArray` leaves, post-training; what is not selected stays as it is.

    Works leaf by leaf: beyond input and output, at most one leaf is held in memory. Of clustered leaves
    the codebook is quantized, of factorised ones the factors.

    Args:
      params: any tree of arrays.
      bits: 8, 4 or 2. Four- and two-bit codes are packed, on every backend.
      symmetric: no zero point, see `jp.quantize.Spec`.
      group_size: entries per scale along the contracted axis; `None` for one scale per channel.
      otherwise: what becomes of leaves that groups do not divide: `"pad"`, `"channel"`, `"dense"` or
        `"error"`; see `jp.quantize.Spec`.
      dtype: `"float8_e4m3fn"`, `"nf4"` or an integer format's name, instead of `bits`.
      granularity: `"channel"` or `"tensor"`.
      channel_axis, group_axis: where scales lie, instead of what `uses` says; see `jp.quantize.Spec`.
      rules: `[(regex, spec), …]`; the first regex that matches a path in full decides: a `Spec`, a
        number of bits, or `None` to leave the leaf dense. A path without a match is treated as the
        other arguments say. Matching leaves are quantized whether or not `where` selects them.
      uses: of `jp.uses(fn, params, *args)`, or a graph or statistics that carry them: channels are the
        free axes of each leaf, groups lie along its contracted ones, and stacked layers or experts
        never share a scale. Without, names and shapes decide: the last axis has the channels, and of
        three axes and more the first keeps scales of its own, as layers do.
      where: which leaves are quantized; by default the weights: what products, convolutions and
        look-ups use, or, without `uses`, floating leaves with two axes or more that are no biases or
        norms by their names.

    Returns:
      The tree with `QuantizedArray` leaves.

    Raises:
      ValueError: an unsupported format, a group size that does not divide a leaf where
        `otherwise="error"`, NaN or infinity (unless traced), a pattern that matches nothing, uses of
        another tree.

    Warns:
      UserWarning: leaves that groups do not divide, and what became of them; a rule that decided no
        leaf; leaves of three axes and more, read without `uses`.

    Example:
      >>> tree = jp.quantize_tree({"w": jnp.ones((64, 64)), "b": jnp.ones(64)}, bits=4)
      >>> tree["w"].nbytes, tree["b"].nbytes
      (2304, 256)
    """
    base = Spec(
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        otherwise=otherwise,
        dtype=dtype,
        granularity=granularity,
        channel_axis=channel_axis,
        group_axis=group_axis,
    )
    misfits = Misfits()
    specs = specs_for(params, base, rules, where, uses, misfits)
    paths, leaves, treedef = _trees.flatten(params)
    out, names, flags = list(leaves), [], []
    for i, (path, leaf, spec) in enumerate(zip(paths, leaves, specs, strict=True)):
        if spec is None:
            continue

        def one(x: Any, spec: Spec, path: str = path) -> Any:
            known = misfits.fit(spec, path, x)
            if known is None:
                return x
            found, finite = quantize(path, x, known)
            names.append(path)
            flags.append(finite)
            return found

        out[i] = leaf.quantized(one, spec) if has_parts(leaf) else one(_trees.dense(leaf), spec)
    misfits.tell()
    refuse_non_finite(names, flags)
    return treedef.unflatten(out)


def has_parts(leaf: Any) -> bool:
    """Whether a leaf is made of others (codebook, factors), which are quantized in its stead."""
    return callable(getattr(type(leaf), "quantized", None))


def specs_for(
    params: Params,
    base: Spec,
    rules: Rules | None,
    where: Where,
    uses: Any,
    misfits: Misfits,
) -> list[Spec | None]:
    """The spec of each leaf with its axes, in flatten order; `None` where it stays dense.

    Of leaves made of others, which are quantized in their stead, as it was given. What groups do not
    divide is noted in `misfits`, for the caller to tell.
    """
    paths, leaves, _ = _trees.flatten(params)
    specs = _chosen_specs(params, base, rules, where, uses)
    known = _trees.uses_of(params, uses)
    if uses is None:
        is_open = lambda spec: spec is not None and spec.channel_axis is spec.group_axis is None
        _trees.tell_ambiguous(paths, leaves, [is_open(spec) for spec in specs], "quantize")
    _trees.tell_contradictions(paths, known, [spec is not None for spec in specs])
    given = uses is not None
    return [
        spec
        if spec is None or has_parts(leaf)
        else misfits.fit(spec, path, leaf, use, is_read=given)
        for path, leaf, spec, use in zip(paths, leaves, specs, known, strict=True)
    ]


def _chosen_specs(
    params: Params, base: Spec, rules: Rules | None, where: Where, uses: Any
) -> list[Spec | None]:
    """The spec of each leaf as given, by rules and selection."""
    paths, leaves, _ = _trees.flatten(params)
    chosen = _trees.select(params, where, uses=uses)
    specs: list[Spec | None] = [base if hit else None for hit in chosen]
    patterns = []
    for number, rule in enumerate(rules or ()):
        if not isinstance(rule, tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise TypeError(f"rules[{number}]: expected (regex, Spec | bits | None), got {rule!r}")
        patterns.append(
            (_trees.compile_pattern(rule[0], parameter="rules"), _as_spec(number, rule[1]))
        )
    used = [False] * len(patterns)
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        hits = [k for k, (pattern, _) in enumerate(patterns) if pattern.fullmatch(path)]
        if hits and _trees.is_floating(leaf):
            used[hits[0]] = True
            specs[i] = patterns[hits[0]][1]
    floating = [path for path, leaf in zip(paths, leaves, strict=True) if _trees.is_floating(leaf)]
    for (pattern, _), hit in zip(patterns, used, strict=True):
        if not hit:
            shadowed = any(pattern.fullmatch(path) for path in floating)
            text = (
                f"rules: {pattern.pattern!r} decided nothing: earlier rules match the same leaves"
                if shadowed
                else _trees.no_match(pattern.pattern, floating, parameter="rules")
            )
            warnings.warn(text, stacklevel=4)
    return specs


def _as_spec(number: int, spec: Any) -> Spec | None:
    if spec is None or isinstance(spec, Spec):
        return spec
    if isinstance(spec, int):
        return Spec(bits=spec)
    raise TypeError(f"rules[{number}]: expected a Spec, a number of bits or None, got {spec!r}")


def dequantize_tree(tree: PyTree) -> Params:
    """Dense arrays from quantized leaves; other leaves stay. Inverse of `quantize_tree`, up to rounding.

    Args:
      tree: any tree with `QuantizedArray` leaves.

    Returns:
      The same tree with dense leaves of the original shapes and dtypes.

    Example:
      >>> tree = jp.quantize_tree({"w": jnp.array([[1.0, 2.0], [-1.0, 0.0]])})
      >>> jp.dequantize_tree(tree)["w"].tolist()
      [[1.0, 2.0], [-1.0, 0.0]]
    """
    return jax.tree.map(
        lambda x: _materialize(x) if isinstance(x, QuantizedArray) else x,
        tree,
        is_leaf=is_compressed,
    )


@jax.jit
def _materialize(x: QuantizedArray) -> jax.Array:
    return x.materialize()
