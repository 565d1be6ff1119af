"""Weights as powers of what is trained: small ones move little, and end near zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxprune import _trees
from jaxprune._types import Params, Where
from jaxprune.optim._fit import cure, is_empty, takes_update
from jaxprune.optim._masked import required


class PowerpropState(NamedTuple):
    """State of `powerprop`.

    Attributes:
      inner_state: state of the wrapped transform, which sees roots of the weights.
    """

    inner_state: optax.OptState


def powerprop(
    inner: optax.GradientTransformation,
    alpha: float,
    *,
    uses: Any = None,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Train `theta` of `w = theta |theta|^(alpha - 1)`, while the parameters stay `w` (Powerprop).

    Large weights learn faster, small ones slower, so that many end near zero and can be pruned:
    `jp.optim.gradual(jp.optim.powerprop(optax.adam(1e-3), 2.0), schedule)`, or `jp.prune_tree` after
    training. By itself it prunes nothing. `inner` sees `theta` and its gradient, decays and clips those;
    the network, checkpoints and masks see `w`, so that no forward pass changes. A weight of exactly zero
    has no gradient and stays there: what initialisers set to zero should be left out by `where`, and
    masks that grow (`jp.optim.rigl`) need `fresh=`.

    Args:
      inner: any optax transform. Extra arguments `value_fn`, `obj_fn` and `grad` are put in terms of
        `theta` for it.
      alpha: the power, at least 1, where it is `inner` alone.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are powers; by default the weights.

    Returns:
      A transform whose state is a `PowerpropState`.

    Raises:
      ValueError: `alpha` below 1, a `where` that matches nothing (from `init`), or `params` missing (from
        `update`).
      TypeError: compressed leaves among those selected (from `init`).

    Example:
      >>> params = {"w": jnp.array([[4.0, 0.01]])}
      >>> tx = jp.optim.powerprop(optax.sgd(0.1), 2.0)
      >>> updates, state = tx.update({"w": jnp.ones((1, 2))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].round(4).tolist()  # (2 - 0.4)^2, (0.1 - 0.02)^2
      [[2.559999942779541, 0.006399999838322401]]

    Reference: Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", 2021,
    https://arxiv.org/abs/2110.00296
    """
    if not alpha >= 1:
        raise ValueError(f"alpha: expected a number of at least 1, got {alpha}")
    inner = optax.with_extra_args_support(inner)

    def chosen(tree: Params) -> Params:
        return _trees.flatten(tree)[2].unflatten(_trees.select(tree, where, uses=uses))

    def over(f: Any, hits: Params, *trees: Params) -> Params:
        """`f` of the leaves that are powers; of the others the first."""
        change = lambda _, hit, *xs: f(*xs) if hit else xs[0]
        return _trees.map_with_path(change, hits, *trees)

    def init(params: Params) -> PowerpropState:
        if is_empty(params):
            return PowerpropState(inner.init(params))
        hits = chosen(params)
        _check(params, hits)
        return PowerpropState(inner.init(over(lambda w: root(w, alpha), hits, params)))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, PowerpropState]:
        params = required(params, "powerprop")
        hits = chosen(params)
        chain = lambda grads: over(lambda g, w: _chained(g, w, alpha), hits, grads, params)
        given = dict(extra)
        powers = lambda roots: over(lambda t: power(t, alpha), hits, roots)
        for name in extra.keys() & {"value_fn", "obj_fn"}:
            given[name] = lambda x, f=extra[name], **rest: f(powers(x), **rest)
        if "grad" in extra:
            given["grad"] = chain(extra["grad"])
        roots = over(lambda w: root(w, alpha), hits, params)
        new, after = inner.update(chain(updates), state.inner_state, roots, **given)
        new = over(lambda u, w: _stepped(u, w, alpha), hits, new, params)
        return new, PowerpropState(after)

    return optax.GradientTransformationExtraArgs(init, update)


def power(theta: Float[Array, "..."], alpha: float) -> Float[Array, "..."]:
    """`theta |theta|^(alpha - 1)`. Inverse of `root`."""
    return jnp.sign(theta) * jnp.abs(theta) ** alpha


def root(w: Float[Array, "..."], alpha: float) -> Float[Array, "..."]:
    """`sign(w) |w|^(1 / alpha)`, in the dtype of `w`. Inverse of `power`."""
    wide = _wide(w)
    return (jnp.sign(wide) * jnp.abs(wide) ** (1 / alpha)).astype(w.dtype)


def _chained(grad: Array, w: Array, alpha: float) -> Array:
    """The gradient by the root, from that by the weight: times `alpha |theta|^(alpha - 1)`."""
    slope = alpha * jnp.abs(_wide(w)) ** (1 - 1 / alpha)
    return (_wide(grad) * slope).astype(grad.dtype)


def _stepped(update: Array, w: Array, alpha: float) -> Array:
    """The update of a weight whose root moves by `update`."""
    wide = _wide(w)
    theta = jnp.sign(wide) * jnp.abs(wide) ** (1 / alpha)
    step = power(theta + _wide(update), alpha) - wide
    # what does not move must not drift by the rounding of roots and powers
    return jnp.where(update == 0, 0, step).astype(jnp.promote_types(update.dtype, w.dtype))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check(params: Params, hits: Params) -> None:
    paths, leaves, _ = _trees.flatten(params)
    found = jax.tree.leaves(hits)
    if not any(found):
        raise ValueError(
            "where: selects no leaf, so powerprop would do nothing; name the leaves, such as where='.*'"
        )
    for path, leaf, hit in zip(paths, leaves, found, strict=True):
        if hit and not takes_update(leaf):
            raise TypeError(f"params: leaf {path!r} {cure(leaf)}")
