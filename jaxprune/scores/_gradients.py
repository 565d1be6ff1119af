"""Scores that read weights and gradients.

`grads` is a tree like `params`: the gradient of the loss, of one batch or averaged over several.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Scores, Where


def taylor(params: Params, grads: PyTree, *, uses: Any = None, where: Where = None) -> Scores:
    """`|w g|`: how much the loss changes, to first order, when the weight becomes zero.

    Args:
      params: any tree of arrays.
      grads: gradients of the loss, a tree like `params`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative scores in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: `grads` of another structure or shape, or a `where` that matches nothing.

    Example:
      >>> params, grads = {"w": jnp.array([[2.0, -1.0]])}, {"w": jnp.array([[0.5, 3.0]])}
      >>> jp.scores.taylor(params, grads)["w"].tolist()
      [[1.0, 3.0]]

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
    https://arxiv.org/abs/1906.10771
    """
    return _with_gradients(lambda w, g: jnp.abs(w * g), params, "grads", grads, where, uses)


def movement(params: Params, grads: PyTree, *, uses: Any = None, where: Where = None) -> Scores:
    """`-w g`: positive where a descent step moves the weight away from zero.

    Summed over training steps (add up what this returns), it is the score of movement pruning.

    Args:
      params: any tree of arrays.
      grads: gradients of the loss, a tree like `params`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: scores of either sign in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: `grads` of another structure or shape, or a `where` that matches nothing.

    Example:
      >>> params, grads = {"w": jnp.array([[2.0, -1.0]])}, {"w": jnp.array([[0.5, 3.0]])}
      >>> jp.scores.movement(params, grads)["w"].tolist()
      [[-1.0, 3.0]]

    Reference: Sanh et al., "Movement Pruning", 2020, https://arxiv.org/abs/2005.07683
    """
    return _with_gradients(lambda w, g: -w * g, params, "grads", grads, where, uses)


def fisher(params: Params, sq_grads: PyTree, *, uses: Any = None, where: Where = None) -> Scores:
    """`w^2 F / 2` with the diagonal Fisher information `F = E[g^2]`: Optimal Brain Damage.

    Args:
      params: any tree of arrays.
      sq_grads: mean over *examples* of squared per-example gradients, a tree like `params`; entries
        are non-negative.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative scores in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: `sq_grads` of another structure or shape, or a `where` that matches nothing.

    Example:
      >>> params, sq_grads = {"w": jnp.array([[2.0, -1.0]])}, {"w": jnp.array([[0.5, 4.0]])}
      >>> jp.scores.fisher(params, sq_grads)["w"].tolist()
      [[1.0, 2.0]]

    Reference: LeCun et al., "Optimal Brain Damage", 1989; Theis et al., "Faster gaze prediction with
    dense networks and Fisher pruning", 2018, https://arxiv.org/abs/1801.05787
    """
    return _with_gradients(
        lambda w, f: 0.5 * jnp.square(w) * f, params, "sq_grads", sq_grads, where, uses
    )


def _with_gradients(
    score: Callable[[Float[Array, "*shape"], Float[Array, "*shape"]], Float[Array, "*shape"]],
    params: Params,
    name: str,
    grads: PyTree,
    where: Where,
    uses: Any,
) -> Scores:
    grads = _checks.aligned(name, grads, "params", params)
    paths, leaves, treedef = _trees.flatten(params)
    chosen = _trees.select(params, where, uses=uses)
    for path, w, g, hit in zip(paths, leaves, treedef.flatten_up_to(grads), chosen, strict=True):
        if hit and jnp.shape(g) != w.shape:
            raise ValueError(
                f"{name}: leaf {path!r} has shape {jnp.shape(g)}, its parameter {w.shape}; "
                "give gradients of these parameters"
            )
    return _trees.map_selected(
        lambda w, g: score(_trees.dense(w), g),
        lambda _: _trees.unpruned_score(),
        params,
        grads,
        where=where,
        uses=uses,
    )
