"""Penalties on whole units, so that what becomes zero can be compacted."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxprune import _trees
from jaxprune._types import Masks, Params
from jaxprune._uses import Uses
from jaxprune.graph import Graph, Group, Place, places_of
from jaxprune.optim._proximal import Scale, proximal

_TINY = 1e-30


def proximal_group_lasso(
    inner: optax.GradientTransformation,
    strength: float,
    *,
    graph: Graph,
    learning_rate: float | Callable[[Array], Any],
    scale: Scale | None = None,
    ignore: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Train with the penalty `strength * sum sqrt(n) |unit|_2`, which makes whole units zero.

    The units are those of `jp.trace`: channels, neurons, heads. A unit is penalised where it is made: in
    its slices along axes that no product sums over, biases and norms included, `n` entries in all. At
    zero there its value is zero, and what reads it may go as well: `jp.optim.zero_units` masks it for
    `jp.compact`. A leaf with slices of several groups is shrunk by one after the other.

    Args:
      inner: any optax transform, its learning rate included.
      strength: of the penalty, at least 0.
      graph: from `jp.trace`, of the parameters that are trained.
      learning_rate: that of `inner`, or its schedule.
      scale: see `proximal_l1`; of a unit the mean over its entries counts.
      ignore: names of groups that are not penalised.

    Returns:
      A transform whose state is a `ProximalState`.

    Raises:
      ValueError: a negative strength or rate, a graph without units that can go (with the reasons),
        unknown names in `ignore`, parameters other than those traced (from `init`), or `params` missing
        (from `update`).

    Example:
      >>> params = {"a": jnp.array([[3.0, 0.1, 2.0]]), "b": jnp.ones((3, 2))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> graph = jp.trace(fn, params, jnp.ones((1, 1)))
      >>> tx = jp.optim.proximal_group_lasso(optax.sgd(0.1), 2.0, graph=graph, learning_rate=0.1)
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> small_fn, small = jp.compact(fn, params, jp.optim.zero_units(graph, params), jnp.ones((1, 1)))
      >>> small["b"].shape
      (2, 2)

    Reference: Yuan & Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006;
    Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016,
    https://arxiv.org/abs/1608.03665
    """
    groups = _groups(graph, ignore)
    made = [_producers(graph, group) for group in groups]

    def prox(params: Params, size: Any) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        sizes = None if isinstance(size, (int, float, jax.Array)) else treedef.flatten_up_to(size)
        for group, places in zip(groups, made, strict=True):
            count = _entries(leaves, places, group.size)
            total = _gathered([jnp.square(_wide(x)) for x in leaves], places, group.size)
            step = size if sizes is None else _gathered(sizes, places, group.size) / count
            norm = jnp.sqrt(total)
            threshold = strength * step * np.sqrt(count)
            keep = jnp.maximum(0.0, 1.0 - threshold / jnp.maximum(norm, _TINY))
            for place in places:
                leaves[place.leaf] = _scaled(leaves[place.leaf], keep, place)
        return treedef.unflatten(leaves)

    def check(params: Params) -> None:
        shapes = [np.shape(x) for x in jax.tree.leaves(params)]
        if shapes != [tuple(shape) for shape in graph.shapes]:
            raise ValueError(
                "graph: of other parameters than those that are trained; trace a function of these: "
                "jp.trace(fn, params, *args)"
            )

    return proximal("proximal_group_lasso", inner, strength, learning_rate, scale, prox, check)


def zero_units(graph: Graph, params: Params, *, ignore: Sequence[str] = ()) -> Masks:
    """Masks of the units that are zero where they are made, for `jp.compact`.

    Args:
      graph: from `jp.trace`, of these parameters.
      params: the parameters.
      ignore: names of groups that stay whole.

    Returns:
      Masks like the parameters: such a unit is masked in every leaf that has it.

    Raises:
      ValueError: a graph without units that can go (with the reasons), or unknown names in `ignore`.

    Example:
      >>> params = {"a": jnp.array([[3.0, 0.0, 2.0]]), "b": jnp.ones((3, 2))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> masks = jp.optim.zero_units(jp.trace(fn, params, jnp.ones((1, 1))), params)
      >>> masks["b"].tolist()
      [[True], [False], [True]]
    """
    leaves = jax.tree.leaves(params)
    masks: list[Any] = [jnp.array(True) for _ in leaves]
    for group in _groups(graph, ignore):
        largest = _gathered(
            [jnp.abs(_wide(x)) for x in leaves], _producers(graph, group), group.size
        )
        alive = largest > 0
        for leaf, axis, slices, units in places_of(graph, group):
            shape = graph.shapes[leaf]
            flags = jnp.ones(shape[axis], bool).at[slices].min(alive[units])
            masks[leaf] = masks[leaf] & flags.reshape(
                [-1 if i == axis else 1 for i in range(len(shape))]
            )
    return graph.treedef.unflatten(masks)


def _groups(graph: Graph, ignore: Sequence[str]) -> list[Group]:
    known = [group.name for group in graph.groups]
    for name in ignore:
        if name not in known:
            raise ValueError(_trees.no_match(name, known, parameter="ignore"))
    found = [g for g in graph.groups if g.kind != "layers" and g.name not in ignore]
    if not found:
        reasons = "; ".join(f"{path}[{axis}]: {why}" for (path, axis), why in graph.frozen[:4])
        raise ValueError(f"graph: no unit of this function can go: {reasons or 'all are ignored'}")
    return found


def _producers(graph: Graph, group: Group) -> list[Place]:
    """Where units are made: along axes that no product sums over."""
    uses = jax.tree.leaves(graph.uses, is_leaf=lambda x: isinstance(x, Uses))
    places = places_of(graph, group)
    makes = [p for p in places if p.axis - len(graph.shapes[p.leaf]) not in uses[p.leaf].contracted]
    if not makes:
        raise ValueError(
            f"graph: nothing among the parameters makes the units of {group.name!r}, so that no penalty "
            "would make them zero; name it in ignore="
        )
    return makes


def _gathered(leaves: Sequence[Any], places: list[Place], size: int) -> Array:
    """Sums over all entries of each unit."""
    total = jnp.zeros(size)
    for place in places:
        x = jnp.asarray(leaves[place.leaf])
        rest = tuple(i for i in range(x.ndim) if i != place.axis)
        total = total.at[place.units].add(jnp.sum(x, axis=rest)[place.slices])
    return total


def _entries(leaves: Sequence[Any], places: list[Place], size: int) -> np.ndarray:
    count = np.zeros(size)
    for place in places:
        each = leaves[place.leaf].size // leaves[place.leaf].shape[place.axis]
        np.add.at(count, place.units, each)
    return np.maximum(count, 1)


def _scaled(x: Array, keep: Array, place: Place) -> Array:
    factor = jnp.ones(x.shape[place.axis]).at[place.slices].set(keep[place.units])
    return x * factor.astype(x.dtype).reshape([-1 if i == place.axis else 1 for i in range(x.ndim)])


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
