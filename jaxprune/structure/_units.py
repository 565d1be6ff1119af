"""Which units go: scores of entries gathered into scores of units, and the lowest of them masked."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Scores
from jaxprune.graph import Graph, Group, GroupWhere, Only, places_of, reduced
from jaxprune.structure._divided import not_compounded
from jaxprune.structure._latency import search_latency
from jaxprune.structure._native import widths_by_kind, widths_by_label
from jaxprune.structure._rounding import Rounding, by_number, by_platform, largest_multiple
from jaxprune.structure._scoring import (
    NORMALIZATIONS,
    REDUCTIONS,
    kernels_of,
    like_params,
    masks_without,
    normalized,
    open_groups,
    score_units,
)

_SCOPES = ("global", "leaf", "isomorphic")
_BISECTIONS = 24
_SHARE = 0.8  # of a target, that rounded widths leave at least


def unit_masks(
    graph: Graph,
    scores: Scores | None = None,
    *,
    unit_scores: Mapping[str, Any] | None = None,
    sparsity: float | None = None,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    scope: str = "global",
    reduce: str = "kernels",
    normalize: str = "none",
    round_to: int | str = "auto",
    min_units: int = 1,
    only: Only = None,
    where: GroupWhere = None,
    ignore: Sequence[str] = (),
) -> Masks:
    """Masks that remove whole units: channels, neurons, heads, features of a residual stream.

    The score of a unit is a reduction over the entries of its slices, in the leaves that it touches.
    Exactly one target is given.

    Args:
      graph: from `jp.trace`.
      scores: any scores of the traced parameters; leaves that score the scalar `+inf` say nothing.
      unit_scores: instead, scores of units, by name of their group, `{name: (units,)}`: what flows
        through them (`jp.structure.activation_scores`, the better choice where there is data), or the
        rates at which gates open them (`jp.gates.inspect`); groups without scores stay whole.
      sparsity: fraction of the units to remove, in [0, 1]. Of an axis that several groups divide, such
        as heads and their dimensions in one matrix, that fraction of the whole axis.
      params: fraction of the parameters to keep, in (0, 1].
      flops: fraction of the FLOPs of a call to keep, in (0, 1].
      latency: fraction of a call's time to keep, in (0, 1], measured here on JAX's default backend, with
        the traced shapes and made-up values: some eight candidates are compiled and timed in turns with
        the dense function, a second each. What is chosen met the target twice; two searches may differ.
      scope: `"global"` ranks all units together, `"leaf"` within each group, `"isomorphic"` within each
        class of groups of the same kind: those whose members have the same names, ranks and axes, such
        as the neurons of all blocks (Fang et al. 2024, https://arxiv.org/abs/2407.04616).
      reduce: `"kernels"`: the mean over the leaves that products and convolutions use of each one's mean,
        so that large kernels do not outvote small ones, and biases and norms have no voice (over all
        members where a group has no such leaf). Or, over all entries: `"mean"`, `"l1"` (sum of absolute
        values), `"l2"`, `"max"`, or `"first"` (the mean over the group's first member alone).
      normalize: what a unit's score is divided by: `"none"`, or its group's `"mean"`, `"max"` or `"sum"`,
        or `"gaussian"` (subtract the mean, divide by the deviation). All but `"none"` put the units of
        narrow early groups on the scale of those of wide late ones, which empties them: under
        `scope="global"` the mean cost two trained CNNs 40 to 74 % of their answers at a tenth of the
        units (`benchmarks/units.py`). Weights that were never trained differ between groups by their
        initialization only; `scope="leaf"` takes an equal share of each.
      round_to: keep a multiple of so many units of each group, where the group is as large. `"auto"`
        takes the multiples at which JAX's default backend gains (8, 16 and 32 channels on a CPU, whose
        odd widths run slower than larger ones; 8 and 64 on a GPU; 8 and 128 on a TPU): under `latency`
        always, under `params` and `flops` as coarsely as leaves at least four fifths of what was asked
        for. Under `sparsity` it keeps the exact number, which was asked for.
      min_units: keep at least so many units of each group.
      only: kinds of groups that may shrink, such as `"neurons"` or `["heads", "head dim"]`, see
        `Group.kind`; all by default. Fractions of units are of theirs, of parameters and FLOPs of all.
      where: which groups may shrink: a kind, a name or label of a group, or a regular expression matched
        in full against those and the paths of members; a sequence of those; or `f(group) -> bool`.
      ignore: kinds, names and labels of groups and regular expressions of paths that stay whole.

    Returns:
      Masks like the parameters, for `jp.apply_masks`, `jp.masked_update` and `jp.compact`. Stacked layers
      stay; `layer_masks` is for them.

    Raises:
      ValueError: no target or several, a target out of range or out of reach, no units that can go (with
        the reasons), scores of another tree, kinds that the graph has not (with those it has), or
        a `where` or `ignore` that matches nothing.

    Warns:
      UserWarning: nothing goes, though a sparsity was asked for.

    Example:
      >>> tree = {"a": jnp.array([[3.0, 1.0, 2.0]]), "b": jnp.ones((3, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], tree, jnp.ones((1, 1)))
      >>> masks = jp.structure.unit_masks(graph, jp.scores.magnitude(tree), sparsity=1 / 3)
      >>> masks["a"].tolist()
      [[True, False, True]]
    """
    _checks.choice("scope", scope, _SCOPES)
    _checks.choice("reduce", reduce, REDUCTIONS)
    _checks.choice("normalize", normalize, NORMALIZATIONS)
    if round_to != "auto":
        _checks.positive_int("round_to", round_to)
    _checks.positive_int("min_units", min_units)
    target, value = _target(sparsity=sparsity, params=params, flops=flops, latency=latency)
    groups = open_groups(graph, ignore, only=only, where=where)
    ranked = [
        normalized(x, normalize) for x in _scores_of(graph, groups, scores, unit_scores, reduce)
    ]
    classes = _classes(graph, groups, scope)
    if value and target in ("sparsity", "latency"):
        _check_open(graph, groups, ignore, target)

    def choose(rounding: list[Rounding], fraction: float) -> np.ndarray:
        return _chosen(graph, groups, ranked, fraction, classes, rounding)

    exact = by_number(groups, 1 if round_to == "auto" else int(round_to), min_units)
    of_platform = partial(by_platform, graph, groups, min_units)
    if target == "sparsity":
        removed = choose(exact, value)
        if not removed.any() and round(value * sum(group.size for group in groups)):
            _tell_nothing_goes(groups, value, min_units, round_to)
    elif target == "latency":
        rounding = of_platform() if round_to == "auto" else exact
        removed = search_latency(graph, partial(choose, rounding), value)
    elif round_to == "auto":
        removed = _search_rounded(
            choose, of_platform, exact, _measure(graph, target), target, value
        )
    else:
        removed = _search(partial(choose, exact), _measure(graph, target), target, value)
    return masks_without(graph, removed)


def _target(**targets: float | None) -> tuple[str, float]:
    """The one that is given."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"expected one of sparsity=, params=, flops= and latency=, got {sorted(given) or 'none'}"
        )
    ((target, value),) = given.items()
    _checks.fraction(target, value)
    return target, value


def _tell_nothing_goes(
    groups: list[Group], value: float, min_units: int, round_to: int | str
) -> None:
    names = ", ".join(group.name for group in groups[:4])
    warnings.warn(
        f"sparsity: nothing goes at {value:g}: min_units={min_units} and round_to={round_to} "
        f"keep all units of {names}, or no score is finite",
        stacklevel=3,
    )


def _check_open(graph: Graph, groups: list[Group], ignore: Sequence[str], target: str) -> None:
    """Refuses to remove units where none can go."""
    if groups:
        return
    if graph.groups:
        names = ", ".join(group.name for group in graph.groups[:4])
        raise ValueError(f"{target}: nothing to remove: ignore={ignore!r} closes all of {names}")
    reasons = "; ".join(f"{path}[{axis}]: {why}" for (path, axis), why in graph.frozen[:4])
    raise ValueError(
        f"{target}: no unit of this function can go: {reasons or 'no parameter is read'}"
    )


def _scores_of(
    graph: Graph, groups: list[Group], scores: Any, of_units: Mapping[str, Any] | None, reduce: str
) -> list[np.ndarray]:
    """One score per unit of each group."""
    if (scores is None) == (of_units is None):
        raise ValueError(
            "scores, unit_scores: expected one of them: scores of parameters (a tree like them), or of "
            "units by group"
        )
    if of_units is not None:
        _check_units("unit_scores", graph, of_units)
        return [_on_host(of_units.get(g.name, np.full(g.size, np.inf))) for g in groups]
    scores = _checks.aligned("scores", scores, "the traced params", like_params(graph))
    leaves = [_on_host(x) for x in graph.treedef.flatten_up_to(scores)]
    for path, x in zip(graph.paths, leaves, strict=True):
        if np.isnan(x).any():
            raise ValueError(
                f"scores: leaf {path!r} holds NaN, which ranks nothing; find where it comes from"
            )
    kernels = kernels_of(graph) if reduce == "kernels" else ()
    return [score_units(leaves, places_of(graph, g), g.size, reduce, kernels) for g in groups]


def _check_units(parameter: str, graph: Graph, given: Mapping[str, Any]) -> None:
    known = {group.name: group for group in graph.groups}
    for name, value in given.items():
        if name not in known:
            raise ValueError(_trees.no_match(name, [*known], parameter=parameter))
        if np.shape(value) != (known[name].size,):
            raise ValueError(
                f"{parameter}[{name!r}]: shape {np.shape(value)}, the group has {known[name].size} units"
            )
        if np.isnan(np.asarray(value, np.float32)).any():
            raise ValueError(f"{parameter}[{name!r}]: NaN; give every unit a number")


def keep_units(graph: Graph, keep: Mapping[str, Any]) -> Masks:
    """Masks that keep the named units and no others.

    Args:
      graph: from `jp.trace`.
      keep: by name of a group, bools (units,): True = keep. Groups that are not named stay whole.

    Returns:
      Masks like the parameters, for `jp.apply_masks`, `jp.masked_update` and `jp.compact`.

    Raises:
      ValueError: a group that does not exist, flags of another size.

    Example:
      >>> tree = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], tree, jnp.ones((1, 1)))
      >>> jp.structure.keep_units(graph, {"a[1]": [True, False, True]})["a"].tolist()
      [[True, False, True]]
    """
    _check_units("keep", graph, keep)
    removed = np.zeros(len(graph.solution.reason), bool)
    for group in graph.groups:
        if group.name in keep:
            removed[group.units[~np.asarray(keep[group.name], bool)]] = True
    return masks_without(graph, removed)


def _chosen(
    graph: Graph,
    groups: list[Group],
    ranked: list[np.ndarray],
    fraction: float,
    classes: np.ndarray,
    rounding: list[Rounding],
) -> np.ndarray:
    """Per component whether that unit goes, when `fraction` of the units of each class should."""
    everything = np.concatenate([*ranked, np.zeros(0)])
    owner = np.repeat(np.arange(len(groups)), [group.size for group in groups])
    asked = np.zeros(len(groups))
    for kind in np.unique(classes):
        mine = np.flatnonzero(classes[owner] == kind)
        lowest = mine[np.argsort(everything[mine], kind="stable")][: round(fraction * len(mine))]
        alone = classes == kind
        one = fraction * len(mine) * alone  # not rounded where nothing competes
        many = np.bincount(owner[lowest], minlength=len(groups))
        asked += one if alone.sum() == 1 else many
    least = [rounded(0) for rounded in rounding]
    wanted = not_compounded(graph, groups, ranked, asked, least)
    removed = np.zeros(len(graph.solution.reason), bool)
    for group, score, count, rounded in zip(groups, ranked, wanted.tolist(), rounding, strict=True):
        count = min(group.size - rounded(group.size - count), int(np.isfinite(score).sum()))
        removed[group.units[np.argsort(score, kind="stable")[:count]]] = True
    return removed


def _on_host(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


def _classes(graph: Graph, groups: list[Group], scope: str) -> np.ndarray:
    """Numbers that are equal for groups which are ranked together."""
    if scope != "isomorphic":
        return np.arange(len(groups)) if scope == "leaf" else np.zeros(len(groups), int)
    rank = dict(zip(graph.paths, map(len, graph.shapes), strict=True))
    names = [
        tuple(sorted({(path.rpartition("/")[2], rank[path], axis) for path, axis in group.members}))
        for group in groups
    ]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], int)


def _measure(graph: Graph, target: str) -> Callable[[np.ndarray], float]:
    """The fraction of parameters or FLOPs that is left."""
    sizes = lambda removed: sum(
        int(np.prod([len(ids) - removed[ids].sum() for ids in axes.ids]))
        for position, axes in enumerate(graph.own)
        if position not in graph.unread
    )
    cost = lambda removed: graph.cost_without(removed).flops
    count = sizes if target == "params" else cost
    full = count(np.zeros(graph.solution.label.shape, bool))
    return lambda removed: count(graph.solution.removed(removed)) / max(full, 1)


def _search_rounded(
    choose: Callable[[list[Rounding], float], np.ndarray],
    of_platform: Callable[..., list[Rounding]],
    exact: list[Rounding],
    measure: Callable[[np.ndarray], float],
    target: str,
    value: float,
) -> np.ndarray:
    """The search with the coarsest multiples that do not leave much less than the target."""
    finer = 1
    while finer < largest_multiple():
        one = partial(choose, of_platform(finer=finer))
        if measure(one(1.0)) <= value:
            removed = _search(one, measure, target, value)
            if measure(removed) >= _SHARE * value:
                return removed
        finer *= 2
    return _search(partial(choose, exact), measure, target, value)


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
        removed = choose(middle)
        if measure(removed) <= value:
            high, best = middle, removed
        else:
            low = middle
        if high - low < 1e-4:
            break
    return best


def widths(graph: Graph, masks: Masks, *, by: str = "path") -> dict[str, Any]:
    """The sizes that are left once masked units are removed: what to build a native module with.

    Args:
      graph: from `jp.trace`.
      masks: tree of bools with the structure of the traced parameters.
      by: `"path"`: the shape of each parameter. `"label"`: what is left of each group, by its label.
        `"kind"`: one number per kind, `{"num_heads": 6, "num_kv_heads": 2, "mlp": 1024, "layers": 10}`;
        also `embed`, `head_dim`, `channels`, `experts`, `states`. Query heads count all together.

    Returns:
      Sizes by path, label or kind. A native module of these sizes takes the compacted parameters. It
      computes the same where heads, neurons, experts and layers went; where features of the stream or
      dimensions of heads did, modules whose norms or scales divide by their number differ from the masked
      function.

    Raises:
      ValueError: masks of another tree; by kind, groups that differ in width, which no native module with
        one width can hold.

    Example:
      >>> tree = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], tree, jnp.ones((1, 4)))
      >>> keep = jnp.arange(8) < 6
      >>> jp.structure.widths(graph, {"a": keep[None], "b": keep[:, None]})
      {'a': (4, 6), 'b': (6, 2)}
      >>> jp.structure.widths(graph, {"a": keep[None], "b": keep[:, None]}, by="kind")
      {'mlp': 6}
    """
    _checks.choice("by", by, ("path", "label", "kind"))
    if by != "path":
        return (widths_by_kind if by == "kind" else widths_by_label)(graph, masks)
    kept = reduced(graph, graph.removal(masks)).kept
    return {
        path: tuple(len(index) for index in left)
        for path, left in zip(graph.paths, kept, strict=True)
    }
