"""Which units go: scores of entries gathered into scores of units, and the lowest of them masked."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Masks, PyTree, Scores
from jaxprune.graph import Graph, Group, reduced

_REDUCTIONS = ("mean", "l1", "l2", "max", "first")
_NORMALIZATIONS = ("mean", "none", "max", "sum", "gaussian")
_BISECTIONS = 24


def unit_masks(
    graph: Graph,
    scores: Scores,
    *,
    sparsity: float | None = None,
    params: float | None = None,
    flops: float | None = None,
    scope: str = "global",
    reduce: str = "mean",
    normalize: str = "mean",
    round_to: int = 1,
    min_units: int = 1,
    ignore: Sequence[str] = (),
) -> Masks:
    """Masks that remove whole units: channels, neurons, heads, features of a residual stream.

    The score of a unit is a reduction over all entries of all its slices, in every leaf that it touches.
    Exactly one target is given.

    Args:
      graph: from `jp.trace`.
      scores: any scores of the traced parameters; leaves that score the scalar `+inf` say nothing.
      sparsity: fraction of the units to remove, in [0, 1].
      params: fraction of the parameters to keep, in (0, 1].
      flops: fraction of the FLOPs of a call to keep, in (0, 1].
      scope: `"global"` ranks all units together, `"leaf"` within each group.
      reduce: `"mean"`, `"l1"` (sum of absolute values), `"l2"`, `"max"`, or `"first"` (the mean over the
        group's first member alone).
      normalize: what a unit's score is divided by, so that groups compare: its group's `"mean"`, `"max"`
        or `"sum"`; `"gaussian"` (subtract the mean, divide by the deviation) or `"none"`.
      round_to: keep a multiple of so many units of each group, where the group is as large.
      min_units: keep at least so many units of each group.
      ignore: names of groups and regular expressions of paths that stay whole.

    Returns:
      Masks like the parameters, for `jp.apply_masks`, `jp.masked_update` and `jp.compact`.

    Raises:
      ValueError: no target or several, a target out of range or out of reach, scores of another tree, or
        an `ignore` that matches nothing.

    Example:
      >>> tree = {"a": jnp.array([[3.0, 1.0, 2.0]]), "b": jnp.ones((3, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], tree, jnp.ones((1, 1)))
      >>> masks = jp.structure.unit_masks(graph, jp.scores.magnitude(tree), sparsity=1 / 3)
      >>> masks["a"].tolist()
      [[True, False, True]]
    """
    _checks.choice("scope", scope, ("global", "leaf"))
    _checks.choice("reduce", reduce, _REDUCTIONS)
    _checks.choice("normalize", normalize, _NORMALIZATIONS)
    _checks.positive_int("round_to", round_to)
    _checks.positive_int("min_units", min_units)
    targets = {"sparsity": sparsity, "params": params, "flops": flops}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"expected one of sparsity=, params= and flops=, got {sorted(given) or 'none'}"
        )
    ((target, value),) = given.items()
    _checks.fraction(target, value)
    groups = _open_groups(graph, ignore)
    ranked = [_normalized(_unit_scores(graph, scores, g, reduce), normalize) for g in groups]

    def choose(fraction: float) -> np.ndarray:
        return _chosen(graph, groups, ranked, fraction, scope, round_to, min_units)

    if target == "sparsity":
        return _as_masks(graph, choose(value))
    measure = _measure(graph, target)
    return _as_masks(graph, _search(choose, measure, target, value))


def _open_groups(graph: Graph, ignore: Sequence[str]) -> list[Group]:
    """The groups that `ignore` does not name."""
    closed: set[str] = set()
    for pattern in [ignore] if isinstance(ignore, str) else ignore:
        regex = _trees.compile_pattern(pattern, parameter="ignore") if pattern else None
        hits = {
            group.name
            for group in graph.groups
            if group.name == pattern
            or (regex is not None and any(regex.fullmatch(path) for path, _ in group.members))
        }
        if not hits and not (regex and any(regex.fullmatch(path) for path in graph.paths)):
            raise ValueError(_trees.no_match(pattern, graph.paths, parameter="ignore"))
        closed |= hits
    return [g for g in graph.groups if g.name not in closed and g.kind == "units"]


def _unit_scores(graph: Graph, scores: Scores, group: Group, reduce: str) -> np.ndarray:
    """One score per unit of a group, in the order of `group.units`."""
    _checks.same_structure("scores", scores, "the traced params", _like(graph))
    leaves = dict(zip(graph.paths, graph.treedef.flatten_up_to(scores), strict=True))
    place = np.full(len(graph.units.why), -1)
    place[group.units] = np.arange(group.size)
    total, count = np.zeros(group.size), np.zeros(group.size)
    own = dict(zip(graph.paths, graph.own, strict=True))
    scored = [(p, a) for p, a in group.members if np.ndim(leaves[p])]
    for path, axis in scored[:1] if reduce == "first" else scored:
        x = np.abs(np.asarray(leaves[path], np.float64)) if reduce in ("l1", "l2") else leaves[path]
        x = np.moveaxis(np.asarray(x, np.float64), axis, 0).reshape(np.shape(x)[axis], -1)
        per_index = {"l2": np.square(x).sum(1), "max": x.max(1, initial=-np.inf)}.get(
            reduce, x.sum(1)
        )
        position, unit = graph.units.factors(graph.units.label[own[path].ids[axis]])
        mine = place[unit] >= 0
        position, index = position[mine], place[unit[mine]]
        if reduce == "max":
            np.maximum.at(total, index, per_index[position])
        else:
            np.add.at(total, index, per_index[position])
        np.add.at(count, index, x.shape[1])
    if reduce in ("mean", "first"):
        total = total / np.maximum(count, 1)
    total = np.sqrt(total) if reduce == "l2" else total
    return np.where(count > 0, total, np.inf)  # units without any score stay


def _like(graph: Graph) -> PyTree:
    return graph.treedef.unflatten(graph.paths)


def _normalized(x: np.ndarray, how: str) -> np.ndarray:
    known = x[np.isfinite(x)]
    if how == "none" or not len(known):
        return x
    if how == "gaussian":
        return (x - known.mean()) / max(known.std(), 1e-30)
    scale = {"mean": np.abs(known).mean(), "max": np.abs(known).max(), "sum": np.abs(known).sum()}[
        how
    ]
    return x / max(scale, 1e-30)


def _chosen(
    graph: Graph,
    groups: list[Group],
    ranked: list[np.ndarray],
    fraction: float,
    scope: str,
    round_to: int,
    min_units: int,
) -> np.ndarray:
    """Per component whether that unit goes, when `fraction` of all units should."""
    if scope == "leaf":
        wanted = [round(fraction * group.size) for group in groups]
    else:
        everything = np.concatenate([*ranked, np.zeros(0)])
        owner = np.repeat(np.arange(len(groups)), [group.size for group in groups])
        lowest = np.argsort(everything, kind="stable")[: round(fraction * len(everything))]
        wanted = np.bincount(owner[lowest], minlength=len(groups)).tolist()
    gone = np.zeros(len(graph.units.why), bool)
    for group, score, count in zip(groups, ranked, wanted, strict=True):
        left = max(group.size - count, min(min_units, group.size))
        if group.size >= round_to:
            left = min(max(round(left / round_to), 1) * round_to, group.size)
            left = max(left, min(-(-min_units // round_to) * round_to, group.size))
        finite = int(np.isfinite(score).sum())
        gone[group.units[np.argsort(score, kind="stable")[: min(group.size - left, finite)]]] = True
    return gone


def _measure(graph: Graph, target: str) -> Callable[[np.ndarray], float]:
    """The fraction of parameters or FLOPs that is left."""
    sizes = lambda removed: sum(
        int(np.prod([len(ids) - removed[ids].sum() for ids in axes.ids])) for axes in graph.own
    )
    cost = lambda removed: graph.cost_without(removed).flops
    count = sizes if target == "params" else cost
    full = count(np.zeros(graph.units.label.shape, bool))
    return lambda gone: count(graph.units.removed(gone)) / max(full, 1)


def _search(
    choose: Callable[[float], np.ndarray],
    measure: Callable[[np.ndarray], float],
    target: str,
    value: float,
) -> np.ndarray:
    """The least removal that reaches the target, by bisection of the fraction of units."""
    most = choose(1.0)
    if measure(most) > value:
        raise ValueError(
            f"{target}: {value:g} is out of reach: with everything removed that may be, "
            f"{measure(most):.3f} is left; lower min_units, round_to or ignore less"
        )
    low, high, best = 0.0, 1.0, most
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        gone = choose(middle)
        if measure(gone) <= value:
            high, best = middle, gone
        else:
            low = middle
        if high - low < 1e-4:
            break
    return best


def _as_masks(graph: Graph, gone: np.ndarray) -> Masks:
    removed = graph.units.removed(gone)
    masks = []
    for axes, shape in zip(graph.own, graph.shapes, strict=True):
        mask = np.ones((1,) * len(shape), bool)
        for axis, ids in enumerate(axes.ids):
            flags = removed[ids]
            if flags.any():
                mask = mask & ~flags.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        masks.append(jnp.asarray(mask if not mask.all() else True))
    return graph.treedef.unflatten(masks)


def widths(graph: Graph, masks: Masks) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters once masked units are removed: what to build a native module with.

    Args:
      graph: from `jp.trace`.
      masks: tree of bools with the structure of the traced parameters.

    Returns:
      Shape by path.

    Raises:
      ValueError: masks of another tree.

    Example:
      >>> tree = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], tree, jnp.ones((1, 4)))
      >>> keep = jnp.arange(8) < 6
      >>> jp.structure.widths(graph, {"a": keep[None], "b": keep[:, None]})
      {'a': (4, 6), 'b': (6, 2)}
    """
    kept = reduced(graph, graph.removal(masks)).kept
    return {
        path: tuple(len(index) for index in left)
        for path, left in zip(graph.paths, kept, strict=True)
    }
