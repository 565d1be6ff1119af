"""Scores at initialisation that differentiate a loss: of connections, and of the flow of gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._types import Params, Scores, Where
from jaxprune.scores._chosen import chosen_of, gradients, loss_of, wide


def snip(
    loss_fn: Callable[..., Any], params: Params, *batch: Any, uses: Any = None, where: Where = None
) -> Scores:
    """SNIP: `|w dL/dw|` on one batch, the sensitivity of the loss to each connection.

    `jp.scores.accumulate` averages it over batches or examples.

    Args:
      loss_fn: `loss_fn(params, *batch)`, a scalar.
      params: any tree of dense arrays.
      *batch: what follows `params` in `loss_fn`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative float32 scores in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: a loss that is no scalar, a NaN, or a `where` that matches nothing.
      TypeError: compressed leaves.

    Example:
      >>> loss = lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2)
      >>> params = {"w": jnp.array([[2.0], [-1.0]])}
      >>> jp.scores.snip(loss, params, jnp.array([[1.0, 0.5]]), jnp.array([[0.0]]))["w"].tolist()
      [[6.0], [1.5]]

    Reference: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2018,
    https://arxiv.org/abs/1810.02340
    """
    chosen = chosen_of(params, where, uses)
    found = gradients(loss_fn, chosen, batch)
    pairs = zip(chosen.leaves, found, strict=True)
    return chosen.scores("snip", [jnp.abs(wide(w) * wide(g)) for w, g in pairs])


def grasp(
    loss_fn: Callable[..., Any], params: Params, *batch: Any, uses: Any = None, where: Where = None
) -> Scores:
    """GraSP: `w (H g)`, how much the squared norm of the gradient would fall without the weight.

    To second order, removing `w` changes `|g|^2` by `-2 w (H g)`. The paper prunes where `-w (H g)` is
    largest; here larger = keep, so the sign is turned. The paper divides the logits by a temperature
    (200) before the softmax: do so in `loss_fn`, since saturated softmaxes have no curvature. Gradients
    that are not of the chosen leaves do not count.

    Args:
      loss_fn: `loss_fn(params, *batch)`, a scalar, twice differentiable.
      params: any tree of dense arrays.
      *batch: what follows `params` in `loss_fn`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: float32 scores of either sign in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: a loss that is no scalar, a NaN, or a `where` that matches nothing.
      TypeError: compressed leaves.

    Example:
      >>> loss = lambda p, x, y: jnp.mean((x @ p["w"] / 200.0 - y) ** 2)
      >>> params = {"w": jnp.array([[2.0], [-1.0]])}
      >>> scores = jp.scores.grasp(loss, params, jnp.array([[1.0, 0.5]]), jnp.array([[1.0]]))
      >>> jnp.sign(scores["w"]).tolist()
      [[-1.0], [1.0]]

    Reference: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020,
    https://arxiv.org/abs/2002.07376
    """
    chosen = chosen_of(params, where, uses)
    gradient = jax.grad(loss_of(loss_fn, chosen, batch))
    # H g is the derivative of the gradient in the direction of the gradient
    product = jax.jvp(gradient, (chosen.leaves,), (gradient(chosen.leaves),))[1]
    pairs = zip(chosen.leaves, product, strict=True)
    return chosen.scores("grasp", [wide(w) * wide(h) for w, h in pairs])
