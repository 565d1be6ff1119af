"""Thresholds that are learned, one per layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, Where
from jaxprune.optim._fit import is_empty, takes_update
from jaxprune.optim._forward import ForwardRule, forward
from jaxprune.optim._moving import Seen
from jaxprune.optim._view import view


def soft_threshold(
    inner: optax.GradientTransformation,
    *,
    initial: float = -5.0,
    rate: float = 0.1,
    decay: float = 1e-2,
    uses: Any = None,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Run on `sign(w) max(|w| - sigmoid(s), 0)`, with an `s` per layer that learns (STR).

    The parameters stay dense. The loss is that of `jp.optim.sparse_params(opt_state, params)`; so is the
    network in the end. Each layer finds a sparsity of its own: the decay draws `s` towards 0, where the
    threshold is 0.5, and the loss holds it where the weights are needed. Layers of a stack have an `s`
    each. The sparsity is set by `decay` and by the weight decay of `inner`, not directly:
    `jp.optim.metrics` tells it.

    Args:
      inner: any optax transform, for the weights; weight decay belongs to the method.
      initial: of `s`, finite: thresholds begin at `sigmoid(initial)`.
      rate: learning rate of `s`, above 0, by plain gradient descent.
      decay: `decay * s` is added to the gradient of `s`, at least 0.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers.
      where: which leaves have thresholds; by default the weights.

    Returns:
      A transform whose state is a `ForwardState`; the `s` are `state.memory["thresholds"]`, with size-1
      axes of the leaf; a scalar 0 for leaves that have none.

    Raises:
      ValueError: a number out of range, a `where` that matches nothing (from `init`), or `params` missing
        (from `update`).
      TypeError: compressed leaves among those selected (from `init`).

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [0.25, 0.5]])}
      >>> state = jp.optim.soft_threshold(optax.sgd(0.1), initial=0.0).init(params)
      >>> jp.optim.sparse_params(state, params)["w"].tolist()
      [[0.5, -1.5], [0.0, 0.0]]

    Reference: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", 2020,
    https://arxiv.org/abs/2002.03231
    """
    _checks.positive("rate", rate)
    if not np.isfinite(initial):
        raise ValueError(f"initial: expected a finite number, got {initial}")
    if not decay >= 0:
        raise ValueError(f"decay: expected a number of at least 0, got {decay}")

    def memory(params: Params) -> dict[str, Any]:
        if is_empty(params):
            return {"thresholds": params}
        _, leaves, treedef = _trees.flatten(params)
        columns = leaves, _trees.select(params, where, uses=uses), _trees.uses_of(params, uses)
        found = [_begun(x, hit, use.stacked, initial) for x, hit, use in zip(*columns, strict=True)]
        return {"thresholds": treedef.unflatten(found)}

    def masks_of(params: Params, memory: dict[str, Any]) -> Masks:
        return _trees.map_with_path(_kept, params, memory["thresholds"])

    def reach(seen: Seen) -> tuple[Params, dict[str, Any]]:
        treedef = _trees.flatten(seen.params)[2]
        columns = seen.params, seen.memory["thresholds"], seen.grads
        pairs = [_pulled(*of) for of in zip(*map(treedef.flatten_up_to, columns), strict=True)]
        grads, slopes = (treedef.unflatten(column) for column in zip(*pairs, strict=True))
        learnt = lambda _, s, g: s - rate * (g + decay * s) if s.ndim else s
        found = _trees.map_with_path(learnt, seen.memory["thresholds"], slopes)
        return grads, {"thresholds": found}

    rule = ForwardRule(
        "soft_threshold",
        lambda params: masks_of(params, memory(params)),
        lambda seen: (masks_of(seen.params, seen.memory), seen.memory),
        lambda *_: jnp.array(True),
        memory,
        reach=reach,
        view=_Shrunk(),
    )
    return forward(inner, rule)


@view
@dataclass(frozen=True)
class _Shrunk:
    """Weights shrunk by the thresholds in memory."""

    def __call__(self, params: Params, masks: Masks, memory: dict[str, Any]) -> Params:
        del masks
        shrink = lambda _, p, s: shrunk(p, s) if s.ndim else p
        return _trees.map_with_path(shrink, params, memory["thresholds"])


def shrunk(w: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    """`sign(w) max(|w| - sigmoid(s), 0)`, in the dtype of `w`."""
    threshold = jax.nn.sigmoid(s).astype(w.dtype)
    return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - threshold)


def _begun(leaf: Any, hit: bool, stacked: Sequence[int], initial: float) -> Array:
    shape = tuple(n if i in stacked else 1 for i, n in zip(_ends(leaf), leaf.shape, strict=True))
    return jnp.full(shape, initial, jnp.float32) if hit else jnp.zeros(())


def _ends(leaf: Any) -> range:
    return range(-len(leaf.shape), 0)


def _kept(_: str, w: Any, s: Array) -> Array:
    if not s.ndim:
        return jnp.array(True)
    return shrunk(w, s) != 0 if takes_update(w) else jnp.ones(w.shape, bool)


def _pulled(w: Any, s: Array, grad: Any) -> tuple[Any, Array]:
    """Gradients of a weight and of its threshold from that of what the network ran on."""
    if not s.ndim:
        return grad, s
    wide = jnp.promote_types(w.dtype, jnp.float32)
    _, pull = jax.vjp(shrunk, w.astype(wide), s)
    down, slope = pull(grad.astype(wide))
    return down.astype(grad.dtype), slope
