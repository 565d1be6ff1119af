"""Paths, selection and path-aware maps over any pytree.

A path is the '/'-joined string of the keys from the root to a leaf: `encoder/layers_0/kernel`.
Dictionary keys, sequence indices and attribute names are written alike. The `value` attribute
through which `flax.nnx` variables hold their array is not part of the path, so a path reads the same
for a linen dict and for an `nnx.State`. Compressed leaves count as leaves.
"""

import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._types import PyTree, Where, is_compressed
from jaxprune._uses import Convention, Uses, conventions


def path_str(key_path: Sequence[Any]) -> str:
    """The '/'-joined string of a JAX key path."""
    names = [_key_name(key) for key in key_path]
    is_nnx_value = len(key_path) > 1 and key_path[-1] == jax.tree_util.GetAttrKey("value")
    return "/".join(names[:-1] if is_nnx_value else names)


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def flatten(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Paths, leaves and treedef of `tree`, compressed arrays kept whole."""
    items, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    return [path_str(path) for path, _ in items], [leaf for _, leaf in items], treedef


def leaf_paths(tree: PyTree) -> list[str]:
    """The path of every leaf, in flatten order."""
    return flatten(tree)[0]


def is_function(x: Any) -> bool:
    """Whether something is called rather than a tree: modules that are trees can be called too."""
    return callable(x) and jax.tree_util.treedef_is_leaf(jax.tree.structure(x))


def dense(leaf: Any) -> Any:
    """The dense array of a leaf, compressed or not. Inverse of nothing: information stays lost."""
    return leaf.materialize() if is_compressed(leaf) else leaf


def abstract(leaf: Any) -> Any:
    """Shape and dtype of what a compressed leaf stands for; others as they are."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_compressed(leaf) else leaf


def is_tie(leaf: Any) -> bool:
    """Whether a leaf stands for another of its tree; functions that choose leaves pass it by."""
    return bool(getattr(type(leaf), "is_tie", False))


def resolve_ties(tree: PyTree) -> PyTree:
    """The tree with every tied leaf replaced by what it stands for: the very same array, or made of it.

    A leaf tied under another root (`{"params": tied}`) finds its source beside it.

    Args:
      tree: any tree; without tied leaves it is returned as it is.

    Returns:
      The tree, which any function takes. Gradients of both places add up in the source.

    Raises:
      ValueError: a tied leaf whose source is not in the tree.

    Example:
      >>> tied = jp.tie_tree({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, threshold=0.9)
      >>> full = jp.share.resolve_ties(tied)
      >>> full["b"] is full["a"]
      True
    """
    paths, leaves, treedef = flatten(tree)
    if not any(map(is_tie, leaves)):
        return tree
    held = dict(zip(paths, leaves, strict=True))
    return treedef.unflatten(
        leaf.resolved(path, held) if is_tie(leaf) else leaf for path, leaf in held.items()
    )


def is_few(n: Any, most: float) -> bool:
    """Whether a size is at most so large; a symbolic one, of `jax.export`, may be any and is not."""
    return isinstance(n, (int, np.integer)) and n <= most


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is a floating-point array (or stands for one, and is no tie)."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and not is_tie(leaf)


def rank(leaf: Any) -> int:
    """The number of axes of a leaf, compressed or not."""
    return len(getattr(leaf, "shape", ()))


def conventions_of(paths: Sequence[str], leaves: Sequence[Any]) -> list[Convention]:
    """What leaves are by their names and shapes."""
    return conventions(paths, [tuple(getattr(leaf, "shape", ())) for leaf in leaves])


def uses_of(tree: PyTree, uses: Any = None) -> list[Uses]:
    """What each leaf of `tree` is for, in flatten order.

    Args:
      tree: any pytree.
      uses: of `jp.uses`, on the same paths; or what carries them: a graph of `jp.trace`, statistics of
        `jp.calibrate`. `None`: what names and shapes say by convention.

    Raises:
      ValueError: uses of another tree.
      TypeError: something that carries none.
    """
    paths, leaves, _ = flatten(tree)
    if uses is None:
        return [convention.uses for convention in conventions_of(paths, leaves)]
    items, _ = jax.tree_util.tree_flatten_with_path(
        getattr(uses, "uses", uses), is_leaf=lambda x: isinstance(getattr(x, "uses", x), Uses)
    )
    found = {path_str(path): getattr(leaf, "uses", leaf) for path, leaf in items}
    if not all(isinstance(use, Uses) for use in found.values()) or (paths and not found):
        raise TypeError(
            "uses: expected jp.uses(fn, params, *args), a graph of jp.trace or statistics of "
            f"jp.calibrate, got {type(uses).__name__}"
        )
    odd = sorted(found.keys() ^ set(paths))
    if odd:
        raise ValueError(
            f"uses: of another tree than params ({odd[:3]} differ); make them anew: "
            "jp.uses(fn, params, *args)"
        )
    for path, leaf in zip(paths, leaves, strict=True):
        n = rank(leaf)  # 0 of scores that speak of no weights
        if n and found[path].ndim not in (None, n):
            raise ValueError(
                f"uses: of another tree than params (leaf {path!r} has {n} axes, its uses "
                f"{found[path].ndim}); make them anew: jp.uses(fn, params, *args)"
            )
    return [found[path] for path in paths]


def tell_ambiguous(
    paths: Sequence[str], leaves: Sequence[Any], chosen: Sequence[bool], who: str
) -> None:
    """Warns of chosen leaves whose axes could have other roles than conventions say."""
    known = conventions_of(paths, leaves)
    odd = [
        f"{path!r} {tuple(leaf.shape)}"
        for path, leaf, convention, hit in zip(paths, leaves, known, chosen, strict=True)
        if hit and not convention.is_sure
    ]
    if odd:
        warnings.warn(
            f"{who}: {len(odd)} leaves of three axes and more are read as stacks along their first axis, "
            f"such as {odd[0]}; pass uses=jp.uses(fn, params, *inputs) for the axes that functions read",
            stacklevel=4,
        )


def tell_contradictions(
    paths: Sequence[str], known: Sequence[Uses], chosen: Sequence[bool]
) -> None:
    """Warns of chosen leaves whose uses contradict each other."""
    odd = [
        f"of {path!r}, {use.contradiction}"
        for path, use, hit in zip(paths, known, chosen, strict=True)
        if hit and use.contradiction
    ]
    if odd:
        warnings.warn(f"uses: {'; '.join(odd[:3])}; the first use decides", stacklevel=4)


def select(tree: PyTree, where: Where = None, *, uses: Any = None) -> list[bool]:
    """Which leaves `where` selects, in flatten order.

    Args:
      tree: any pytree.
      where: `None` selects the weights: what products, convolutions and look-ups use, as `uses` says;
        without `uses`, floating leaves with two axes or more that are no biases or norms by their
        names. A string is a regular expression matched *in full* against the path; a sequence selects
        what any of its members selects; a callable gets `(path, leaf)`. Only floating leaves are ever
        selected.
      uses: see `uses_of`.

    Returns:
      One bool per leaf.

    Raises:
      TypeError: `where` is of another type.
      ValueError: a regular expression is malformed, or matches no floating leaf; the message lists
        the nearest paths. Uses of another tree.
    """
    paths, leaves, _ = flatten(tree)
    return _select(paths, leaves, uses_of(tree, uses), where)


def _select(paths: list[str], leaves: list[Any], known: Sequence[Uses], where: Where) -> list[bool]:
    if where is None:
        pairs = zip(leaves, known, strict=True)
        return [is_floating(leaf) and rank(leaf) > 0 and use.is_weight for leaf, use in pairs]
    if isinstance(where, str):
        pattern = compile_pattern(where)
        hits = [
            is_floating(leaf) and pattern.fullmatch(path) is not None
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        if not any(hits):
            candidates = [p for p, leaf in zip(paths, leaves, strict=True) if is_floating(leaf)]
            raise ValueError(no_match(where, candidates))
        return hits
    if callable(where):
        return [
            is_floating(leaf) and bool(where(path, leaf))
            for path, leaf in zip(paths, leaves, strict=True)
        ]
    if isinstance(where, Sequence):
        rows = [_select(paths, leaves, known, item) for item in where]
        return [any(column) for column in zip(*rows, strict=True)] if rows else [False] * len(paths)
    raise TypeError(
        f"where: expected None, a regular expression, a sequence of those or a callable "
        f"(path, leaf) -> bool, got {type(where).__name__}"
    )


def compile_pattern(pattern: str, *, parameter: str = "where") -> re.Pattern[str]:
    """A compiled regular expression, or a `ValueError` that names the parameter."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{parameter}: {pattern!r} is no regular expression ({error}); "
            "escape special characters, e.g. r'layers\\.0/kernel'"
        ) from error


def no_match(pattern: str, paths: Sequence[str], *, parameter: str = "where") -> str:
    """The message for a pattern without a match, with the paths that come nearest to it."""
    if not paths:
        return f"{parameter}: {pattern!r} matches nothing: the tree has no floating leaf"
    near = [path for path in paths if _contains(pattern, path)]
    near += difflib.get_close_matches(pattern, paths, n=5, cutoff=0.3)
    shown = list(dict.fromkeys(near or paths))[:5]
    return (
        f"{parameter}: {pattern!r} matches no path in full; nearest: "
        + ", ".join(repr(path) for path in shown)
        + ". Patterns are matched against the whole path: begin with '.*' to match a suffix"
    )


def _contains(pattern: str, path: str) -> bool:
    return re.search(pattern, path) is not None


def map_selected(
    f: Callable[..., Any],
    other: Callable[[Any], Any],
    tree: PyTree,
    *rest: PyTree,
    where: Where = None,
    uses: Any = None,
) -> PyTree:
    """Maps `f(leaf, *rest_leaves)` over the selected leaves and `other(leaf)` over the others."""
    _, leaves, treedef = flatten(tree)
    chosen = select(tree, where, uses=uses)
    columns = [treedef.flatten_up_to(r) for r in rest]
    return treedef.unflatten(
        f(leaf, *(column[i] for column in columns)) if chosen[i] else other(leaf)
        for i, leaf in enumerate(leaves)
    )


def map_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `f(path, leaf, *rest_leaves)` over all leaves, compressed arrays kept whole."""
    paths, leaves, treedef = flatten(tree)
    columns = [treedef.flatten_up_to(r) for r in rest]
    return treedef.unflatten(
        f(path, leaf, *(column[i] for column in columns))
        for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
    )


def unpruned_score() -> jax.Array:
    """The score of a leaf that nobody prunes."""
    return jnp.array(jnp.inf, jnp.float32)


def magnitudes(params: PyTree) -> PyTree:
    """`|w|` for every floating leaf, `+inf` for the others."""
    return jax.tree.map(
        lambda x: jnp.abs(dense(x)) if is_floating(x) else unpruned_score(),
        params,
        is_leaf=is_compressed,
    )


def restrict(scores: PyTree, params: PyTree, where: Where = None, *, uses: Any = None) -> PyTree:
    """Scores of the leaves that `where` selects among `params`; the others score `+inf`."""
    treedef = flatten(params)[2]
    chosen = select(params, where, uses=uses)
    leaves = treedef.flatten_up_to(scores)
    return treedef.unflatten(
        leaf if hit else unpruned_score() for leaf, hit in zip(leaves, chosen, strict=True)
    )
