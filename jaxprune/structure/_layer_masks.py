"""Masks of the layers that matter least."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Scores
from jaxprune.graph import Graph
from jaxprune.structure._layer_scores import mean_score
from jaxprune.structure._layers import Layer, some_layers
from jaxprune.structure._scoring import like_params


def layer_masks(
    graph: Graph,
    scores: Scores | None = None,
    *,
    layer_scores: Mapping[str, float] | None = None,
    sparsity: float | None = None,
    count: int | None = None,
    flops: float | None = None,
    contiguous: bool = False,
    pattern: str | None = None,
    where: str | Sequence[str] | Callable[[Layer], bool] | None = None,
    ignore: Sequence[str] = (),
) -> Masks:
    """Masks that remove whole layers of a residual network; `jp.compact` then leaves nothing of them.

    Exactly one target is given.

    Args:
      graph: from `jp.trace`.
      scores: any scores of the traced parameters, which are averaged over each layer.
      layer_scores: instead, a score by name of the layer, of `jp.structure.layer_scores`.
      sparsity: fraction of the layers to remove, in [0, 1].
      count: number of layers to remove.
      flops: fraction of the FLOPs of a call to keep, in (0, 1]; the fewest layers that reach it go.
      contiguous: remove neighbours: those that start at the layer of the lowest score, which should come
        from `layer_scores(span=…)` of as many layers.
      pattern: what counts as one layer, see `layers`.
      where: the layers that may go: regular expressions matched in full against names of layers and
        paths of their parameters, or `f(layer) -> bool`; all by default. Fractions are of them.
      ignore: regular expressions, searched in names of layers that stay.

    Returns:
      Masks like the parameters, for `jp.apply_masks`, `jp.masked_update` and `jp.compact`.

    Raises:
      ValueError: no layer may go; no target or several, or one out of range or reach; scores that lack
        layers; a `where` or `ignore` that matches none.

    Example:
      >>> tree = {"in": jnp.ones((4, 4)), "up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> def fn(p, x):
      ...     h = x @ p["in"]
      ...     return h + jax.nn.relu(h @ p["up"]) @ p["down"]
      >>> graph = jp.trace(fn, tree, jnp.ones((1, 4)))
      >>> masks = jp.structure.layer_masks(graph, jp.scores.magnitude(tree), count=1)
      >>> bool(masks["up"].any()), bool(masks["in"].all())
      (False, True)
    """
    given = {
        name: value
        for name, value in (("sparsity", sparsity), ("count", count), ("flops", flops))
        if value is not None
    }
    if len(given) != 1:
        raise ValueError(
            f"expected one of sparsity=, count= and flops=, got {sorted(given) or 'none'}"
        )
    everything = some_layers(graph, pattern)
    ranked = _by_layer(graph, everything, scores, layer_scores)
    closed = [_trees.compile_pattern(p, parameter="ignore") for p in _as_list(ignore)]
    chosen = _chosen(graph, everything, where)
    open_layers = [x for x in chosen if not any(regex.search(x.name) for regex in closed)]
    for regex in closed:
        if not any(regex.search(x.name) for x in everything):
            names = [x.name for x in everything]
            raise ValueError(_trees.no_match(regex.pattern, names, parameter="ignore"))
    if flops is not None:
        return _until(graph, open_layers, ranked, flops, contiguous)
    if sparsity is not None:
        _checks.fraction("sparsity", sparsity)
        count = round(sparsity * len(open_layers))
    if count is None or isinstance(count, bool) or not 0 <= count <= len(open_layers):
        raise ValueError(f"count: expected 0 to {len(open_layers)} layers, got {count}")
    return _masks_without(graph, _lowest(open_layers, ranked, count, contiguous))


def _chosen(graph: Graph, found: Sequence[Layer], where: Any) -> list[Layer]:
    """The layers that `where` selects."""
    if where is None:
        return list(found)
    texts = {x.name: [x.name, *(graph.paths[i] for i, _ in x.leaves)] for x in found}
    if callable(where):
        hits = {x.name for x in found if where(x)}
        if not hits:
            raise ValueError(f"where: the function selects no layer of {[*texts][:6]}")
        return [x for x in found if x.name in hits]
    hits = set[str]()
    for pattern in _as_list(where):
        regex = _trees.compile_pattern(pattern)
        mine = {
            name for name, own in texts.items() if name == pattern or any(map(regex.fullmatch, own))
        }
        if not mine:
            raise ValueError(_trees.no_match(pattern, [*texts]))
        hits |= mine
    return [x for x in found if x.name in hits]


def _as_list(patterns: Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _by_layer(
    graph: Graph, found: tuple[Layer, ...], scores: Any, of_layers: Mapping[str, float] | None
) -> dict[str, float]:
    """Score by layer, as given or from scores of parameters."""
    if (scores is None) == (of_layers is None):
        raise ValueError(
            "scores, layer_scores: expected one of them: scores of parameters (a tree like them), or "
            "those of structure.layer_scores by name of the layer"
        )
    if of_layers is not None:
        if not isinstance(of_layers, Mapping) or any(np.ndim(x) for x in of_layers.values()):
            raise ValueError(
                "layer_scores: expected one number per layer, as layer_scores gives them"
            )
        return {name: float(x) for name, x in of_layers.items()}
    scores = _checks.aligned("scores", scores, "the traced params", like_params(graph))
    return {layer.name: mean_score(graph, layer, scores) for layer in found}


def _lowest(
    found: list[Layer], ranked: dict[str, float], count: int, contiguous: bool
) -> list[Layer]:
    if contiguous:
        starts = [i for i in range(len(found) - count + 1) if found[i].name in ranked]
        if not count or not starts:
            return []
        start = min(starts, key=lambda i: ranked[found[i].name])
        return found[start : start + count]
    missing = [layer.name for layer in found if layer.name not in ranked]
    if missing:
        raise ValueError(
            f"layer_scores: no score of layer {missing[0]!r}; use the names of structure.layers(graph), "
            "or contiguous=True with scores of several layers"
        )
    return sorted(found, key=lambda layer: ranked[layer.name])[:count]


def _until(
    graph: Graph, found: list[Layer], ranked: dict[str, float], flops: float, contiguous: bool
) -> Masks:
    """The fewest layers whose removal leaves no more than this fraction of the FLOPs."""
    _checks.fraction("flops", flops)
    full = graph.cost().flops
    for count in range(len(found) + 1):
        masks = _masks_without(graph, _lowest(found, ranked, count, contiguous))
        left = graph.cost(masks).flops / max(full, 1)
        if left <= flops:
            return masks
    raise ValueError(
        f"flops: {flops:g} is out of reach: without any of the {len(found)} layers that may go, "
        f"{left:.3f} is left; remove units too, with structure.unit_masks"
    )


def _masks_without(graph: Graph, removed: Sequence[Layer]) -> Masks:
    masks: list[Any] = [jnp.asarray(True)] * len(graph.paths)
    stacked: dict[int, np.ndarray] = {}
    for layer in removed:
        for position, index in layer.leaves:
            shape = graph.shapes[position]
            if index is None:
                masks[position] = jnp.zeros(shape, bool)
            else:
                keep = stacked.setdefault(
                    position, np.ones((shape[0], *(1 for _ in shape[1:])), bool)
                )
                keep[index] = False
    for position, keep in stacked.items():
        masks[position] = jnp.asarray(keep)
    return graph.treedef.unflatten(masks)
