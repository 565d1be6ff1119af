"""Penalties that make exact zeros: proximal steps after the steps of any optimizer.

An optimizer descends the loss; the proximal step then solves
`min_x |x - z|^2 / (2 t) + strength * penalty(x)` exactly, from where the optimizer went, `z`. Its
size `t` is the learning rate, times what an adaptive optimizer scales each coordinate by (`scale=`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxprune import _checks, _trees
from jaxprune._types import Params, Where
from jaxprune.optim._fit import cure, is_empty, takes_update
from jaxprune.optim._masked import required

Scale = Callable[[optax.OptState], Any]
ProxFn = Callable[[Params, Any], Params]


class ProximalState(NamedTuple):
    """State of the proximal transforms.

    Attributes:
      step: int32 scalar, updates so far; also `.count`, see `SparseState`.
      inner_state: state of the wrapped transform.
    """

    step: Int[Array, ""]
    inner_state: optax.OptState

    @property
    def count(self) -> Int[Array, ""]:  # ty: ignore[incompatible-property-override]
        """Updates so far."""
        return self.step


def proximal_l1(
    inner: optax.GradientTransformation,
    strength: float,
    *,
    learning_rate: float | Callable[[Array], Any],
    scale: Scale | None = None,
    uses: Any = None,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Train with the penalty `strength * |w|_1`, which makes weights exactly zero.

    After each step of `inner` weights shrink by `learning_rate * strength` and stop at zero (soft
    thresholding, ISTA). Those at zero may leave it again. Nothing may follow in a chain.

    Args:
      inner: any optax transform, its learning rate included.
      strength: of the penalty, at least 0.
      learning_rate: that of `inner`, or its schedule.
      scale: `inner_state -> tree` of what `inner` scales each coordinate of the gradient by, so that the
        step is that of the same metric; with Adam
        `lambda s: jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + 1e-8), optax.tree.get(s, "nu"))`. Without,
        the penalty is decoupled from the scaling, as the weight decay of AdamW is.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are penalised; by default the weights.

    Returns:
      A transform whose state is a `ProximalState`.

    Raises:
      ValueError: a negative strength or rate, a `where` that matches nothing (from `init`), or `params`
        missing (from `update`).
      TypeError: compressed leaves among those penalised (from `init`).

    Example:
      >>> params = {"w": jnp.array([[1.0, -0.05]])}
      >>> tx = jp.optim.proximal_l1(optax.sgd(0.1), 1.0, learning_rate=0.1)
      >>> grads = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [[0.8999999761581421, 0.0]]

    Reference: Yun et al., "ProxGen: Adaptive Proximal Gradient Methods for Structured Neural Networks",
    2020, https://arxiv.org/abs/2006.07484
    """

    def prox(params: Params, size: Any) -> Params:
        chosen = _chosen(params, where, uses)

        def shrink(_: str, z: Any, hit: bool, t: Any) -> Any:
            if not hit:
                return z
            t = jnp.asarray(strength * t, z.dtype)
            return jnp.sign(z) * jnp.maximum(jnp.abs(z) - t, jnp.zeros((), z.dtype))

        return _trees.map_with_path(shrink, params, chosen, _per_leaf(size, params))

    def check(params: Params) -> None:
        hits, (paths, leaves, _) = _chosen(params, where, uses), _trees.flatten(params)
        pairs = zip(paths, leaves, jax.tree.leaves(hits), strict=True)
        for path, leaf, hit in pairs:
            if hit and not takes_update(leaf):
                raise TypeError(f"params: leaf {path!r} {cure(leaf)}")
        if not any(jax.tree.leaves(hits)):
            raise ValueError("where: selects no leaf, so proximal_l1 would penalise nothing")

    return proximal("proximal_l1", inner, strength, learning_rate, scale, prox, check)


def proximal(
    name: str,
    inner: optax.GradientTransformation,
    strength: float,
    learning_rate: float | Callable[[Array], Any],
    scale: Scale | None,
    prox: ProxFn,
    check: Callable[[Params], None],
) -> optax.GradientTransformationExtraArgs:
    """A transform that makes a step of `inner`, then `prox(params, size)`."""
    if not strength >= 0:
        raise ValueError(f"strength: expected a number of at least 0, got {strength}")
    if not callable(learning_rate):
        _checks.positive("learning_rate", learning_rate)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> ProximalState:
        if not is_empty(params):
            check(params)
        return ProximalState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ProximalState]:
        params = required(params, name)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        new, inner_state = inner.update(updates, state.inner_state, params, **extra)
        moved = optax.apply_updates(params, new)
        size = rate if scale is None else jax.tree.map(lambda s: rate * s, scale(inner_state))
        shrunk = prox(moved, size)
        new = _trees.map_with_path(_difference, params, shrunk, moved, new)
        step = jnp.asarray(optax.safe_increment(state.step))
        return new, ProximalState(step, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _difference(_: str, param: Any, shrunk: Any, moved: Any, update: Any) -> Any:
    """The update that leads to `shrunk`, to exactly zero where that is."""
    if not takes_update(param):
        return update
    step = jnp.where(shrunk == moved, update, (shrunk - param).astype(update.dtype))
    return jnp.where(shrunk == 0, -param, step)


def _chosen(params: Params, where: Where, uses: Any) -> Params:
    treedef = _trees.flatten(params)[2]
    return treedef.unflatten(_trees.select(params, where, uses=uses))


def _per_leaf(size: Any, params: Params) -> Params:
    if isinstance(size, (int, float, jax.Array)):
        return jax.tree.map(lambda _: size, params)
    return size
