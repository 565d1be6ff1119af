"""Joint choices of width and depth that reach one size, and what each does to the outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks
from jaxprune._types import Masks, Params
from jaxprune.graph import Graph, reduced
from jaxprune.masks import apply_masks
from jaxprune.structure._layer_masks import layer_masks
from jaxprune.structure._layer_scores import kl_divergence
from jaxprune.structure._layers import some_layers
from jaxprune.structure._units import unit_masks

_BISECTIONS = 12


@dataclass(frozen=True, repr=False)
class Candidate:
    """One choice of depth and width.

    Attributes:
      layers: how many layers go.
      sparsity: fraction of the units that goes besides, of each group.
      params, flops: fractions that are left.
      damage: what the masks do to the outputs, nothing trained.
      masks: masks like the parameters.
    """

    layers: int
    sparsity: float
    params: float
    flops: float
    damage: float
    masks: Masks

    def __repr__(self) -> str:
        return (
            f"Candidate({self.layers} layers and {self.sparsity:.1%} of the units go; {self.params:.1%} "
            f"of parameters, {self.flops:.1%} of FLOPs left; damage {self.damage:.4g})"
        )


def candidates(
    graph: Graph,
    fn_params: Params,
    *args: Any,
    layer_scores: Mapping[str, float],
    unit_scores: Mapping[str, Any] | None = None,
    scores: Any = None,
    params: float | None = None,
    flops: float | None = None,
    counts: Sequence[int] | None = None,
    damage: Callable[[Any, Any], Any] | None = None,
    pattern: str | None = None,
    **how: Any,
) -> list[Candidate]:
    """Depths, and for each the width at which a target size is reached, the least damage first.

    Widths take an equal share of each group (`scope="leaf"`), so that a native configuration exists.

    Args:
      graph: from `jp.trace`.
      fn_params: the traced parameters.
      *args: inputs on which the damage is measured, once per candidate.
      layer_scores: of `jp.structure.layer_scores`.
      unit_scores, scores: scores of units or of parameters, one of them, as in `unit_masks`.
      params, flops: fraction to keep, one of them, in (0, 1].
      counts: numbers of layers to remove; by default all for which the target can be met.
      damage: `(output, output of the masked function) -> scalar`; by default the mean Kullback-Leibler
        divergence of their softmax.
      pattern: what counts as one layer, see `layers`.
      **how: more of `unit_masks`: `only`, `where`, `ignore`, `round_to`, `min_units`.

    Returns:
      `Candidate`s, ascending in damage.

    Raises:
      ValueError: no target or both, no depth at which the target can be met, or what `unit_masks` and
        `layer_masks` refuse.

    Example:
      >>> tree = {"up": jnp.ones((3, 4, 8)), "down": jnp.ones((3, 8, 4))}
      >>> layer = lambda h, p: (h + jnp.tanh(h @ p["up"]) @ p["down"], None)
      >>> fn, x = lambda p, x: jax.lax.scan(layer, x, p)[0], jnp.ones((1, 4))
      >>> graph = jp.trace(fn, tree, x)
      >>> by_layer = jp.structure.layer_scores(graph, tree, x)
      >>> found = jp.structure.candidates(
      ...     graph, tree, x, layer_scores=by_layer, scores=jp.scores.magnitude(tree), params=0.5)
      >>> sorted((c.layers, round(c.params, 2)) for c in found)
      [(0, 0.5), (1, 0.5), (2, 0.33)]
    """
    given = {k: v for k, v in (("params", params), ("flops", flops)) if v is not None}
    if len(given) != 1:
        raise ValueError(
            f"expected one of params= and flops=, got {sorted(given) or 'both or none'}"
        )
    ((target, value),) = given.items()
    _checks.fraction(target, value)
    deepest = len(some_layers(graph, pattern))
    tried = list(range(deepest)) if counts is None else list(counts)
    dense = graph.fn(fn_params, *args)
    judge = kl_divergence if damage is None else damage
    found = []
    for count in tried:
        depth = layer_masks(graph, layer_scores=layer_scores, count=count, pattern=pattern)
        units = lambda sparsity, depth=depth: _both(
            depth,
            unit_masks(
                graph, scores, unit_scores=unit_scores, sparsity=sparsity, scope="leaf", **how
            ),
        )
        reached = _narrowest(graph, units, target, value)
        if reached is None:
            continue
        sparsity, masks = reached
        out = graph.fn(apply_masks(fn_params, masks), *args)
        sizes = (left_of(graph, masks, "params"), left_of(graph, masks, "flops"))
        found.append(Candidate(count, sparsity, *sizes, float(judge(dense, out)), masks))
    if not found:
        raise ValueError(
            f"{target}: {value:g} is out of reach of any of the depths {tried}; remove more layers "
            "(counts=), lower min_units or ignore less"
        )
    return sorted(found, key=lambda candidate: candidate.damage)


def _both(a: Masks, b: Masks) -> Masks:
    return jax.tree.map(jnp.logical_and, a, b)


def left_of(graph: Graph, masks: Masks, target: str) -> float:
    """The fraction of parameters or FLOPs that masks leave."""
    if target == "flops":
        return graph.cost(masks).flops / max(graph.cost().flops, 1)
    kept = reduced(graph, graph.removal(masks)).kept
    left = sum(int(np.prod([len(index) for index in leaf])) for leaf in kept)
    return left / max(sum(int(np.prod(shape)) for shape in graph.shapes), 1)


def _narrowest(
    graph: Graph, units: Callable[[float], Masks], target: str, value: float
) -> tuple[float, Masks] | None:
    """The least sparsity of units at which the target is met."""
    masks = units(0.0)
    if left_of(graph, masks, target) <= value:
        return 0.0, masks
    best, low, high = units(1.0), 0.0, 1.0
    if left_of(graph, best, target) > value:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        masks = units(middle)
        if left_of(graph, masks, target) <= value:
            high, best = middle, masks
        else:
            low = middle
    return high, best
