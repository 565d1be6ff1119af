"""A sparse forward pass, a less sparse backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, Where
from jaxprune.masks import AnyPattern
from jaxprune.optim._fit import is_empty, takes_update
from jaxprune.optim._forward import ForwardRule, forward
from jaxprune.optim._moving import Seen
from jaxprune.optim._selection import Selection


def top_kast(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    backward_sparsity: float,
    penalty: float = 1e-4,
    every: int = 100,
    scope: str = "leaf",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Run on the largest weights, and train some more of them (Top-KAST).

    The forward mask keeps the weights of largest magnitude, the backward mask a larger set of them; the
    others stay as they are. A penalty on both sets lets weights move out and others in: `penalty * w`
    is added to the gradient of those in the forward pass, `penalty * w / (1 - sparsity)` to that of the
    rest of the backward set. The loss is that of `jp.optim.sparse_params(opt_state, params)`.

    Args:
      inner: any optax transform.
      sparsity: of the forward pass, in [0, 1).
      backward_sparsity: of the backward pass, at most `sparsity`.
      penalty: strength of the exploration penalty, at least 0.
      every: masks are made anew at multiples of this many steps.
      scope: `"leaf"` or `"global"`, see `jp.masks.from_scores`.
      pattern: see `jp.masks.from_scores`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are masked; by default the weights.

    Returns:
      A transform whose state is a `ForwardState`; the backward masks are `state.memory["backward"]`.

    Raises:
      ValueError: numbers out of range, an unknown scope, a `where` or pattern that does not fit the
        parameters (from `init`), or `params` missing (from `update`).

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> tx = jp.optim.top_kast(optax.sgd(0.1), 0.75, backward_sparsity=0.5, penalty=0.0)
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, jp.optim.sparse_params(state, params))
      >>> updates, state = tx.update(grads, state, params)
      >>> updates["w"].tolist()
      [[0.0, -0.10000000149011612], [-0.10000000149011612, 0.0]]

    Reference: Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2021,
    https://arxiv.org/abs/2106.03517
    """
    _checks.fraction("sparsity", sparsity)
    _checks.fraction("backward_sparsity", backward_sparsity)
    _checks.positive_int("every", every)
    if backward_sparsity > sparsity or sparsity == 1:
        raise ValueError(
            f"backward_sparsity: expected at most sparsity={sparsity} (below 1), the backward pass "
            f"being the denser one; got {backward_sparsity}"
        )
    if penalty < 0:
        raise ValueError(f"penalty: expected a number of at least 0, got {penalty}")
    select = Selection(scope, pattern, uses, where)

    def masks_of(params: Params, target: float) -> Masks:
        like = select.all_kept(params, lambda p, _: scores(p))
        new = select.masks(scores(params), target)
        return jax.tree.map(lambda m, full: jnp.broadcast_to(m, full.shape), new, like)

    def scores(params: Params) -> Params:
        return select.restricted(_trees.magnitudes(params), params)

    def memory(params: Params) -> dict[str, Any]:
        return {"backward": params if is_empty(params) else masks_of(params, backward_sparsity)}

    def move(seen: Seen) -> tuple[Masks, dict[str, Any]]:
        return masks_of(seen.params, sparsity), memory(seen.params)

    def reach(seen: Seen) -> tuple[Params, dict[str, Any]]:
        def pulled(_: str, g: Any, p: Any, forward: Any, backward: Any) -> Any:
            if not takes_update(p) or not jnp.ndim(backward):
                return g
            pull = jnp.where(forward, penalty, penalty / (1 - sparsity)) * p
            return jnp.where(backward, g + pull.astype(g.dtype), jnp.zeros((), g.dtype))

        trees = seen.params, seen.masks, seen.memory["backward"]
        return _trees.map_with_path(pulled, seen.grads, *trees), seen.memory

    rule = ForwardRule(
        "top_kast",
        lambda params: masks_of(params, sparsity),
        move,
        lambda step, _: step % every == 0,
        memory,
        reach=reach,
        free=lambda _, memory: memory["backward"],
    )
    return forward(inner, rule)
