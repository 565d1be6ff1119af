"""From scores to masks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Masks, PyTree, Scores
from jaxprune._uses import Uses
from jaxprune.masks._keys import kept
from jaxprune.masks._patterns import NM, Pattern, TreePattern, pattern_on
from jaxprune.masks._select import largest

_LIMIT = 2**31 - 1

AnyPattern = Pattern | NM | TreePattern


def from_scores(
    scores: Scores,
    sparsity: float | jax.Array | PyTree,
    *,
    scope: str = "global",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    min_keep: int = 0,
) -> Masks:
    """Masks that keep the entries with the largest scores: exactly `round((1 - s) * size)` of them.

    `size` counts the entries of all scored leaves together (`scope="global"`) or of each leaf
    (`scope="leaf"`, or a budget tree). With a pattern, units take the place of entries. Ties go to
    earlier leaves and earlier positions, so the count is exact for any scores.

    Scores are compared as the backend compares floats: `-0.0` equals `0.0`, and where subnormal numbers
    are flushed (XLA on CPU) they equal 0 too.

    One jitted call, without host callbacks: a search for the threshold that reads the scores a few
    times and exchanges only counts, so sharded scores stay where they are.

    Args:
      scores: tree of float arrays, one score per weight, larger = kept; a scalar leaf (`+inf`, by
        convention) is not pruned and gets the mask `True`.
      sparsity: fraction to remove, in [0, 1]: a number, a traced scalar, or a tree of such with the
        structure of `scores` (see `jp.budgets`), which implies one count per leaf.
      scope: `"global"` (one threshold for all leaves) or `"leaf"` (one per leaf).
      pattern: `None`, `Block`, `Channel`, `NM`, or `jp.structure.Units` for whole channels, neurons
        and heads across leaves, with `scope="leaf"` for each group of them. With `NM(n, m)` the sparsity
        may be at most `1 - n / m`: there, every group keeps exactly `n`; below, further entries stay by
        score.
      uses: of `jp.uses(fn, params, *args)`, or a graph or statistics that carry them: only the weights
        among the scored leaves are pruned, patterns lie along the axes that uses name, and with
        `scope="leaf"` each layer of a stack counts as a leaf, as it would unstacked. Without, patterns
        that need an axis take it by convention.
      min_keep: entries (or units of the pattern) that each leaf keeps at least, with one count per
        leaf: 1 never empties a leaf, as in jaxpruner.

    Returns:
      Tree of bool arrays with the structure of `scores`; True = keep.

    Raises:
      ValueError: a sparsity outside [0, 1] or unreachable by the pattern, a NaN score (unless
        traced, where NaN counts as `-inf`), a pattern that does not fit a leaf, a budget tree of
        another structure, `min_keep` under one threshold for all leaves, or more than 2^31 - 1 entries
        under one threshold.
      TypeError: a score that is no float array.

    Example:
      >>> scores = jp.scores.magnitude({"w": jnp.array([[3.0, -1.0], [0.5, 2.0]])})
      >>> jp.masks.from_scores(scores, 0.5)
      {'w': Array([[ True, False],
             [False,  True]], dtype=bool)}
    """
    _checks.choice("scope", scope, ("global", "leaf"))
    _checks.positive_int("min_keep", min_keep, least=0)
    if isinstance(pattern, TreePattern):
        pooled = pattern.pool_tree(scores)
        found = from_scores(pooled, sparsity, scope=scope, min_keep=min_keep)
        return _checks.aligned("masks", pattern.expand_tree(found), "scores", scores)
    paths, leaves, treedef = _trees.flatten(scores)
    known = _trees.uses_of(scores, uses)
    chosen = [
        i
        for i, leaf in enumerate(leaves)
        if _trees.rank(leaf) > 0 and (uses is None or known[i].is_weight)
    ]
    for i in chosen:
        if not _trees.is_floating(leaves[i]):
            raise TypeError(
                f"scores: leaf {paths[i]!r} is {getattr(leaves[i], 'dtype', type(leaves[i]))}, "
                "expected floats; a leaf that nobody prunes scores the scalar +inf"
            )
    if pattern is not None:
        pruned = set(chosen)
        hits = [i in pruned for i in range(len(leaves))]
        _trees.tell_contradictions(paths, known, hits)
        if uses is None and getattr(pattern, "axis", None) in ("contracted", "free"):
            _trees.tell_ambiguous(paths, leaves, hits, "from_scores")
    patterns = [pattern_on(pattern, paths[i], np.shape(leaves[i]), known[i]) for i in chosen]
    budget = _budget(sparsity, scores, paths, treedef, chosen)
    by_leaf = scope == "leaf" or isinstance(budget, list)
    if min_keep and not by_leaf:
        raise ValueError(
            f"min_keep: {min_keep} per leaf takes a count per leaf; "
            'use scope="leaf", or a tree of budgets'
        )
    spread = _may_be_spread(leaves)
    arrays = [jnp.asarray(leaves[i]) for i in chosen]
    _no_nan([paths[i] for i in chosen], arrays)
    stacks = [known[i] if uses is not None and by_leaf else None for i in chosen]
    found = _masks(arrays, budget, by_leaf, patterns, stacks, spread, min_keep)
    masks: list[Any] = [jnp.array(True) for _ in leaves]
    for i, mask in zip(chosen, found, strict=True):
        masks[i] = mask
    return treedef.unflatten(masks)


def _budget(
    sparsity: Any, scores: Scores, paths: list[str], treedef: Any, chosen: list[int]
) -> Any:
    """A scalar, or the list of the chosen leaves' fractions; checked."""
    if isinstance(sparsity, (int, float, np.number, np.ndarray, jax.Array)):
        _checks.fraction("sparsity", sparsity)
        return sparsity
    sparsity = _checks.aligned("sparsity", sparsity, "scores", scores)
    fractions = treedef.flatten_up_to(sparsity)
    for path, value in zip(paths, fractions, strict=True):
        _checks.fraction(f"sparsity[{path!r}]", value)
    return [fractions[i] for i in chosen]


def _masks(
    scores: list[jax.Array],
    budget: Any,
    by_leaf: bool,
    patterns: list[Any],
    stacks: list[Uses | None],
    spread: bool,
    min_keep: int,
) -> Sequence[jax.Array]:
    if not scores:
        return []
    if isinstance(patterns[0], NM):
        cap = patterns[0].sparsity
        budget = _capped(budget, cap)
        groups = [_nm(pattern, score) for pattern, score in zip(patterns, scores, strict=True)]
        if _always(budget, cap):
            return groups
        # entries that the pattern keeps anyway come first, the others by score
        scores = [jnp.where(group, jnp.inf, s) for group, s in zip(groups, scores, strict=True)]
    shapes = [score.shape for score in scores]
    units = patterns[0] is not None and not isinstance(patterns[0], NM)
    if units:
        scores = [_pool(pattern, score) for pattern, score in zip(patterns, scores, strict=True)]
    parts = [_layers(score, use) for score, use in zip(scores, stacks, strict=True)]
    counts = [len(part) for part in parts]
    if isinstance(budget, list):
        budget = [s for s, count in zip(budget, counts, strict=True) for _ in range(count)]
    rows = [row for part in parts for row in part]
    sizes = [row.size for row in rows]
    keep = _keep(sizes, budget, by_leaf)
    if min_keep:
        keep = jnp.maximum(keep, jnp.minimum(min_keep, jnp.asarray(sizes)))
    found = iter(largest(rows, keep, by_leaf=by_leaf, spread=spread))
    masks = [
        _together([next(found) for _ in range(count)], score.shape, use)
        for count, score, use in zip(counts, scores, stacks, strict=True)
    ]
    if units:
        triples = zip(patterns, masks, shapes, strict=True)
        masks = [_expand(pattern, mask, shape) for pattern, mask, shape in triples]
    return masks


def _order(use: Uses, ndim: int) -> tuple[list[int], list[int]]:
    """The stacked axes, and the others, of an array of `ndim` axes."""
    stacked = [axis % ndim for axis in use.stacked]
    return stacked, [i for i in range(ndim) if i not in stacked]


def _layers(scores: jax.Array, use: Uses | None) -> list[jax.Array]:
    """The scores of each layer of a stack. Inverse: `_together`."""
    if use is None or not use.stacked:
        return [scores]
    stacked, rest = _order(use, scores.ndim)
    count = int(np.prod([scores.shape[i] for i in stacked]))
    return list(jnp.transpose(scores, (*stacked, *rest)).reshape(count, -1))


def _together(masks: list[jax.Array], shape: tuple[int, ...], use: Uses | None) -> jax.Array:
    """The mask of a stack from those of its layers. Inverse: `_layers`."""
    if use is None or not use.stacked:
        return masks[0]
    stacked, rest = _order(use, len(shape))
    order = [*stacked, *rest]
    stack = jnp.stack(masks).reshape([shape[i] for i in order])
    return jnp.transpose(stack, np.argsort(order).tolist())


@partial(jax.jit, static_argnums=0)
def _nm(pattern: NM, scores: jax.Array) -> jax.Array:
    return pattern.mask(scores)


@partial(jax.jit, static_argnums=0)
def _pool(pattern: Pattern, scores: jax.Array) -> jax.Array:
    return pattern.pool(scores)


@partial(jax.jit, static_argnums=(0, 2))
def _expand(pattern: Pattern, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return pattern.expand(mask, shape)


def _keep(sizes: list[int], budget: Any, by_leaf: bool) -> jax.Array:
    """Entries to keep per segment."""
    counted = sizes if by_leaf else [sum(sizes)]
    if max(counted) > _LIMIT:
        raise ValueError(
            f"scores: {max(counted)} entries under one threshold, at most {_LIMIT} are supported; "
            'use scope="leaf", or a pattern of blocks or channels'
        )
    fractions = budget if isinstance(budget, list) else [budget] * len(counted)
    return jnp.stack(
        [jnp.asarray(kept(s, n), jnp.int32) for s, n in zip(fractions, counted, strict=True)]
    )


def _capped(budget: Any, cap: float) -> Any:
    """The budget, checked against the most that the pattern can remove; traced values are clipped."""
    if isinstance(budget, list):
        return [_capped(value, cap) for value in budget]
    if _checks.is_traced(budget):
        return jnp.minimum(budget, cap)
    if float(budget) > cap + 1e-6:
        raise ValueError(
            f"sparsity: the N:M pattern removes at most {cap:g}, got {float(budget):g}; "
            "choose a smaller n, or a smaller sparsity"
        )
    return min(float(budget), cap)


def _always(budget: Any, cap: float) -> bool:
    values = budget if isinstance(budget, list) else [budget]
    return all(not _checks.is_traced(v) and abs(float(v) - cap) < 1e-6 for v in values)


def _may_be_spread(leaves: Sequence[Any]) -> bool:
    """Whether any leaf is, or being traced may be, spread over several devices."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    if any(_checks.is_traced(leaf) for leaf in arrays):
        return jax.device_count() > 1
    return any(len(leaf.sharding.device_set) > 1 for leaf in arrays)


def _no_nan(paths: list[str], arrays: Sequence[jax.Array]) -> None:
    bad = _checks.flagged(paths, [_has_nan(array) for array in arrays])
    if bad:
        raise ValueError(
            f"scores: NaN in leaf {bad[0]!r}"
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
            + "; look for a diverged loss or a division by zero in the score"
        )


@jax.jit
def _has_nan(x: jax.Array) -> jax.Array:
    return jnp.isnan(jnp.max(x)) if x.size else jnp.array(False)  # the maximum hands a NaN on
