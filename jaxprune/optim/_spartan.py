"""A soft mask that sharpens, under a hard one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, ScheduleFn, Where
from jaxprune.optim._fit import is_empty
from jaxprune.optim._forward import ForwardRule, forward
from jaxprune.optim._moving import Seen
from jaxprune.optim._selection import Selection, as_schedule, wanted
from jaxprune.optim._view import view

_HALVINGS = 40
_OPEN = 20.0  # sigmoid(20) is 1 in float32


def spartan(
    inner: optax.GradientTransformation,
    schedule: ScheduleFn | float,
    *,
    sharpness: Callable[[Array], Any] | float = 10.0,
    every: int = 1,
    scope: str = "leaf",
    uses: Any = None,
    where: Where = None,
    min_keep: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Run on the largest weights times a soft top-k mask, with the gradient of the soft mask (Spartan).

    The soft mask of `k` of `n` weights is `sigmoid(sharpness |w| / mean |w| + shift)` with the `shift` at
    which it sums to `k`: the entropy-regularised transport of weights to "kept" and "dropped". The
    forward pass multiplies it on and keeps the `k` largest; the backward pass goes through the soft
    mask, the shift included, so that weights around the threshold compete and dropped ones can return.
    At sharpness 0 that is a dense network, at infinity `jp.optim.straight_through` without its gradients
    for what is dropped. The parameters stay dense. The loss is that of
    `jp.optim.sparse_params(opt_state, params)`; so is the network in the end.

    Args:
      inner: any optax transform.
      schedule: `step -> sparsity` (or a tree of them), or a number.
      sharpness: a number of at least 0, or a function of the step, such as one that grows to 10 or 20.
      every: masks, shifts and the mean are made anew at multiples of this many steps.
      scope: `"leaf"` (soft masks of each leaf sum to its `k`) or `"global"` (those of all together).
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are masked; by default the weights.
      min_keep: weights that each leaf keeps at least; 0 with `scope="global"`.

    Returns:
      A transform whose state is a `ForwardState`; slopes and shifts of the soft masks are in
      `state.memory`.

    Raises:
      ValueError: a number out of range, an unknown scope, a schedule of trees with `scope="global"`, a
        `where` that does not fit the parameters (from `init`), or `params` missing (from `update`).
      TypeError: a schedule of another type.

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> state = jp.optim.spartan(optax.sgd(0.1), 0.5, sharpness=3.0).init(params)
      >>> jp.optim.sparse_params(state, params)["w"].round(2).tolist()
      [[0.0, -1.3799999952316284], [2.799999952316284, 0.0]]

    Reference: Tai et al., "Spartan: Differentiable Sparsity via Regularized Transportation", 2022,
    https://arxiv.org/abs/2205.14107
    """
    schedule = as_schedule(schedule)
    _checks.positive_int("every", every)
    if not callable(sharpness) and not sharpness >= 0:
        raise ValueError(f"sharpness: expected a number of at least 0, got {sharpness}")
    select = Selection(scope, None, uses, where, min_keep if scope == "leaf" else 0)

    def sizes_of(params: Params) -> Params:
        return select.restricted(_trees.magnitudes(params), params)

    def memory_at(params: Params, step: Array) -> dict[str, Any]:
        beta = jnp.asarray(sharpness(step) if callable(sharpness) else sharpness, jnp.float32)
        leaves, treedef = jax.tree.flatten(sizes_of(params))
        density = 1 - _per_leaf(wanted(schedule, step), leaves, treedef, scope)
        slopes, shifts = [jnp.zeros(()) for _ in leaves], [jnp.zeros(()) for _ in leaves]
        for group in _together(leaves, scope):
            slope, shift = _fitted([leaves[i] for i in group], density[group[0]], beta)
            for i in group:
                slopes[i], shifts[i] = jnp.copy(slope), jnp.copy(shift)  # a state may be donated
        return {"slope": treedef.unflatten(slopes), "shift": treedef.unflatten(shifts)}

    def memory(params: Params) -> dict[str, Any]:
        if is_empty(params):
            return {"slope": params, "shift": params}
        return memory_at(params, jnp.zeros((), jnp.int32))

    def masks_at(params: Params, step: Array) -> Masks:
        return select.masks(sizes_of(params), wanted(schedule, step))

    def reach(seen: Seen) -> tuple[Params, dict[str, Any]]:
        leaves, treedef = jax.tree.flatten(seen.params)
        columns = seen.grads, seen.masks, seen.memory["slope"], seen.memory["shift"]
        grads, masks, slopes, shifts = map(treedef.flatten_up_to, columns)
        found = list(grads)
        for group in _together(masks, scope):
            of = lambda tree, group=group: [tree[i] for i in group]
            for i, g in zip(group, _pulled(*map(of, (leaves, grads, slopes, shifts))), strict=True):
                found[i] = g
        return treedef.unflatten(found), seen.memory

    rule = ForwardRule(
        "spartan",
        lambda params: masks_at(params, jnp.zeros((), jnp.int32)),
        lambda seen: (masks_at(seen.params, seen.step), memory_at(seen.params, seen.step)),
        lambda step, _: step % every == 0,
        memory,
        reach=reach,
        view=_Softened(),
    )
    return forward(inner, rule)


@view
@dataclass(frozen=True)
class _Softened:
    """The weights that masks keep, times their soft masks."""

    def __call__(self, params: Params, masks: Masks, memory: dict[str, Any]) -> Params:
        def soften(_: str, p: Any, m: Any, slope: Array, shift: Array) -> Any:
            if not jnp.ndim(m):
                return p
            soft = _soft(p, slope, shift)
            return jnp.where(m, soft * p, jnp.zeros((), p.dtype)).astype(p.dtype)

        return _trees.map_with_path(soften, params, masks, memory["slope"], memory["shift"])


def soft_top_k_shift(z: list[Float[Array, "..."]], k: Float[Array, ""]) -> Float[Array, ""]:
    """The `shift` at which `sigmoid(z + shift)` sums to `k`, by bisection."""
    low = -_OPEN - jnp.max(jnp.stack([jnp.max(x) for x in z]))
    high = _OPEN - jnp.min(jnp.stack([jnp.min(x) for x in z]))

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        total = jnp.sum(jnp.stack([jnp.sum(jax.nn.sigmoid(x + middle)) for x in z]))
        return jnp.where(total < k, middle, low), jnp.where(total < k, high, middle)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return (low + high) / 2


def _fitted(sizes: list[Array], density: Array, beta: Array) -> tuple[Array, Array]:
    """Slope and shift of the soft mask of some leaves together."""
    wide = [x.astype(jnp.float32) for x in sizes]
    count = sum(x.size for x in wide)
    mean = jnp.sum(jnp.stack([jnp.sum(x) for x in wide])) / count
    slope = beta / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)
    return slope, soft_top_k_shift([slope * x for x in wide], density * count)


def _pulled(weights: list, grads: list, slopes: list, shifts: list) -> list[Array]:
    """Gradients of dense weights from those of the softly masked ones, the sum of masks held fixed."""
    soft = [_soft(*of) for of in zip(weights, slopes, shifts, strict=True)]
    give = [m * (1 - m) for m in soft]
    pull = [
        g.astype(jnp.float32) * w.astype(jnp.float32) for g, w in zip(grads, weights, strict=True)
    ]
    total = lambda xs: jnp.sum(jnp.stack([jnp.sum(x) for x in xs]))
    weighed = total([s * a for s, a in zip(give, pull, strict=True)])
    mean = weighed / jnp.maximum(total(give), jnp.finfo(jnp.float32).tiny)
    found = []
    for w, g, m, s, a, slope in zip(weights, grads, soft, give, pull, slopes, strict=True):
        through = jnp.sign(w).astype(jnp.float32) * slope * s * (a - mean)
        found.append((g.astype(jnp.float32) * m + through).astype(g.dtype))
    return found


def _soft(w: Array, slope: Array, shift: Array) -> Array:
    return jax.nn.sigmoid(slope * jnp.abs(w).astype(jnp.float32) + shift)


def _together(leaves: list[Any], scope: str) -> list[list[int]]:
    """Numbers of the masked leaves whose soft masks have one sum."""
    masked = [i for i, leaf in enumerate(leaves) if jnp.ndim(leaf)]
    return [masked] if scope == "global" and masked else [[i] for i in masked]


def _per_leaf(target: Any, leaves: list[Any], treedef: Any, scope: str) -> Array:
    if isinstance(target, jax.Array):
        return jnp.broadcast_to(target, (len(leaves),))
    if scope == "global":
        raise ValueError('schedule: a tree of sparsities needs scope="leaf"')
    return jnp.stack([jnp.asarray(t) for t in treedef.flatten_up_to(target)])
