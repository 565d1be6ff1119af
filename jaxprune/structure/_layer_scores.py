"""How much each layer of a residual network matters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks
from jaxprune._types import Params, PyTree, Scores
from jaxprune.graph import Graph, iterations_of
from jaxprune.program import Executor, Operation, inputs_of, split_scan
from jaxprune.structure._layers import Layer, some_layers

_MEASURES = ("influence", "angular", "loss", "kl", "magnitude")


def layer_scores(
    graph: Graph,
    params: Params,
    *args: Any,
    by: str = "influence",
    loss: Callable[[Any], jax.Array] | None = None,
    scores: Scores | None = None,
    pattern: str | None = None,
    span: int = 1,
    **kwargs: Any,
) -> dict[str, float]:
    """How much each layer matters; the least may go.

    Args:
      graph: from `jp.trace`.
      params: the parameters.
      *args: inputs, of any batch size.
      by: `"influence"`: 1 - cosine similarity of the residual stream before and after (block influence,
        Men et al. 2024, ShortGPT). `"angular"`: the angle between them over pi (Gromov et al. 2024).
        `"loss"`: by how much the loss rises without the layer. `"kl"`: the mean Kullback-Leibler
        divergence of the softmax of the output, which must be one array of logits, from that without
        the layer. `"magnitude"`: the mean of `scores` over the layer's parameters. The first two compare
        along the last axis and average over all others.
      loss: `output -> scalar`, for `by="loss"`.
      scores: any scores, for `by="magnitude"`; the absolute weights by default.
      pattern: what counts as one layer, see `layers`.
      span: compare across so many consecutive layers, counted from each; a layer too late for that has
        no score.
      **kwargs: further inputs.

    Returns:
      Score by name of the layer, in order.

    Raises:
      ValueError: no layer is found, or `loss` is missing.

    Example:
      >>> tree = {"in": jnp.ones((4, 4)), "up": jnp.ones((4, 8)), "down": jnp.zeros((8, 4))}
      >>> def fn(p, x):
      ...     h = x @ p["in"]
      ...     return h + jax.nn.relu(h @ p["up"]) @ p["down"]
      >>> graph = jp.trace(fn, tree, jnp.ones((1, 4)))
      >>> scores = jp.structure.layer_scores(graph, tree, jnp.ones((1, 4)))
      >>> abs(scores["down, up"]) < 1e-6
      True
    """
    _checks.choice("by", by, _MEASURES)
    _checks.positive_int("span", span)
    graph = graph.for_inputs(params, *args, **kwargs) if args or kwargs else graph
    found = some_layers(graph, pattern)
    leaves = graph.treedef.flatten_up_to(params)
    if by == "magnitude":
        tree = jax.tree.map(jnp.abs, params) if scores is None else scores
        each = [mean_score(graph, layer, tree) for layer in found]
    elif by in ("loss", "kl"):
        arrays = inputs_of(args, kwargs).arrays
        if by == "kl":
            outs, _ = Executor().run(graph.program, [*leaves, *arrays])
            loss = partial(kl_divergence, graph.program.out_tree.unflatten(outs))
        if loss is None:
            raise ValueError('loss: by="loss" needs loss=, a function of the output, got None')
        each = _loss_changes(graph, found, leaves, arrays, loss)
    else:
        pairs = _streams(graph, found, leaves, inputs_of(args, kwargs).arrays)
        each = [
            _distance(pairs[i][0], pairs[i + span - 1][1], by) for i in range(len(found) - span + 1)
        ]
        return {layer.name: x for layer, x in zip(found, each, strict=False)}
    sums = [sum(each[i : i + span]) for i in range(len(each) - span + 1)]
    return {layer.name: x for layer, x in zip(found, sums, strict=False)}


def _loss_changes(
    graph: Graph, found: tuple[Layer, ...], leaves: list[Any], inputs: list[Any], loss: Any
) -> list[float]:
    """The rise of the loss when each layer alone is masked; one compilation for all."""
    keep = [np.ones(_mask_shape(graph, found, i), bool) for i in range(len(leaves))]

    @jax.jit
    def run(keep: list[Any]) -> jax.Array:
        masked = [
            jnp.where(k, x, jnp.zeros((), x.dtype)) for k, x in zip(keep, leaves, strict=True)
        ]
        outs, _ = Executor().run(graph.program, [*masked, *inputs])
        return loss(graph.program.out_tree.unflatten(outs))

    dense = float(run(keep))
    changes = []
    for layer in found:
        flags = [k.copy() for k in keep]
        for position, index in layer.leaves:
            flags[position][... if index is None else index] = False
        changes.append(float(run(flags)) - dense)
    return changes


def kl_divergence(dense: Any, other: Any) -> jax.Array:
    """The mean over all but the last axis of KL(softmax(dense) || softmax(other)), in nats."""
    if not all(hasattr(x, "ndim") and x.ndim for x in (dense, other)):
        raise ValueError(
            "output: expected one array of logits, (..., classes), for a divergence, got "
            f"{jax.tree.structure(dense)}; give a function of the output"
        )
    a, b = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (dense, other))
    return jnp.mean(jnp.sum(jnp.exp(a) * (a - b), -1))


def _mask_shape(graph: Graph, found: tuple[Layer, ...], position: int) -> tuple[int, ...]:
    shape = graph.shapes[position]
    stacked = any(p == position and i is not None for layer in found for p, i in layer.leaves)
    return (shape[0], *(1 for _ in shape[1:])) if stacked else ()


def _streams(
    graph: Graph, found: tuple[Layer, ...], leaves: list[Any], inputs: list[Any]
) -> list[tuple[jax.Array, jax.Array]]:
    """The residual stream before and after each layer."""
    wanted = {number for layer in found for span in layer.spans for number in span}
    scans = [op for op in graph.program.operations if op.outs[:1] and op.outs[0] in wanted]
    carries = [(op, *_main_carry(graph, op)) for op in scans if op.outs[0] in iterations_of(graph)]
    entered = {op.outs[0] for op, *_ in carries}
    numbers = wanted.union(*(ends for _, *ends in carries))

    @jax.jit
    def run(leaves: list[Any], inputs: list[Any]) -> dict[str, Any]:
        def note(operation: Operation, outs: list[Any]) -> dict[str, Any]:
            made = zip(operation.outs, outs, strict=True)
            return {str(i): x for i, x in made if i in numbers}

        executor = Executor(note=note, enters=lambda op: not entered.isdisjoint(op.outs[:1]))
        kept = executor.run(graph.program, [*leaves, *inputs])[1]
        given = zip(graph.program.inputs, [*leaves, *inputs], strict=True)
        kept |= {str(i): x for i, x in given if i in numbers}
        for scan, start, after in carries:  # (iterations + 1, ...)
            ends = [kept[str(start)][None], kept[str(after)]]
            order = -1 if scan.params["reverse"] else 1
            kept[str(scan.outs[0])] = jnp.concatenate(ends[::order])
        return kept

    kept = {int(name): x for name, x in run(leaves, inputs).items()}
    pairs = []
    for layer in found:
        first, index = layer.spans[0]
        if layer.leaves[0][1] is not None:
            pairs.append((kept[first][index], kept[first][index + 1]))
        else:
            pairs.append((kept[first], kept[layer.spans[-1][1]]))
    return pairs


def _main_carry(graph: Graph, scan: Operation) -> tuple[int, int]:
    """The largest floating carry of a scan: number of its start, and of the result of an iteration."""
    n_consts, n_carry = split_scan(scan.params)
    avals = [graph.program.avals[i] for i in scan.ins[n_consts : n_consts + n_carry]]
    floats = [i for i, x in enumerate(avals) if jnp.issubdtype(x.dtype, jnp.floating)]
    main = max(floats, key=lambda i: avals[i].size)
    return scan.ins[n_consts + main], scan.inner[0].outputs[main]


def _distance(before: jax.Array, after: jax.Array, by: str) -> float:
    a, b = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (before, after))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = jnp.where(norms > 0, jnp.sum(a * b, -1) / jnp.maximum(norms, 1e-30), 1.0)
    if by == "influence":
        return float(jnp.mean(1 - cosine))
    return float(jnp.mean(jnp.arccos(jnp.clip(cosine, -1, 1)) / jnp.pi))


def mean_score(graph: Graph, layer: Layer, scores: PyTree) -> float:
    """The mean of the scores of a layer's entries."""
    leaves = graph.treedef.flatten_up_to(scores)
    total, count = 0.0, 0
    for position, index in layer.leaves:
        x = np.asarray(leaves[position], np.float64)
        x = x if index is None or not x.ndim else x[index]
        if np.isfinite(x).all():
            total, count = total + x.sum(), count + x.size
    return float(total / count) if count else float("inf")
