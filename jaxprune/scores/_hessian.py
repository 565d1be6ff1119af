"""The diagonal of the Hessian by random probes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _checks
from jaxprune._types import Params, PyTree, Where
from jaxprune.scores._chosen import chosen_of, gradients, loss_of, wide


def hessian_diagonal(
    loss_fn: Callable[..., Any],
    params: Params,
    *batch: Any,
    key: jax.Array,
    probes: int = 16,
    uses: Any = None,
    where: Where = None,
) -> PyTree:
    """Hutchinson's estimate of the diagonal of the Hessian: the mean of `v * (H v)` over signs `v`.

    Its expectation is exact; the error falls with the square root of `probes`, and there is none where
    the Hessian is diagonal. `jp.scores.fisher(params, …)` of it is `w^2 H_ii / 2`, the saliency of
    Optimal Brain Damage, negative where the loss curves downwards.

    Args:
      loss_fn: `loss_fn(params, *batch)`, a scalar, twice differentiable.
      params: any tree of dense arrays.
      *batch: what follows `params` in `loss_fn`; `jp.scores.accumulate` averages over batches.
      key: a PRNG key.
      probes: random vectors, each a Hessian-vector product.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves; by default the weights, see `jp.quantize_tree`. Only their own block of the
        Hessian is looked at.

    Returns:
      Tree like `params`: float32 of either sign, in the weight's shape; 0 for other leaves.

    Raises:
      ValueError: a loss that is no scalar, a NaN, or a `where` that matches nothing.
      TypeError: compressed leaves.

    Example:
      >>> loss = lambda p: 1.5 * p["w"][0, 0] ** 2 - p["w"][1, 0] ** 2
      >>> diagonal = jp.scores.hessian_diagonal(loss, {"w": jnp.ones((2, 1))}, key=jax.random.key(0))
      >>> diagonal["w"].tolist()
      [[3.0], [-2.0]]

    Reference: Bekas et al., "An estimator for the diagonal of a matrix", 2007; Yao et al., "ADAHESSIAN",
    2020, https://arxiv.org/abs/2006.00719
    """
    _checks.positive_int("probes", probes)
    chosen = chosen_of(params, where, uses)
    gradients(loss_fn, chosen, batch)  # its errors name the loss, and not a transformation of it
    gradient = jax.grad(loss_of(loss_fn, chosen, batch))

    def one(total: list[jax.Array], probe: jax.Array) -> tuple[list[jax.Array], None]:
        keys = jax.random.split(probe, len(chosen.leaves))
        pairs = zip(keys, chosen.leaves, strict=True)
        signs = [jax.random.rademacher(k, w.shape, w.dtype) for k, w in pairs]
        products = jax.jvp(gradient, (chosen.leaves,), (signs,))[1]
        both = zip(total, signs, products, strict=True)
        return [t + wide(v) * wide(h) for t, v, h in both], None

    zeros = [jnp.zeros(w.shape, jnp.float32) for w in chosen.leaves]
    total, _ = jax.lax.scan(one, zeros, jax.random.split(key, probes))
    found = [t / probes for t in total]
    chosen.scores("hessian_diagonal", found)  # refuses NaN
    return chosen.tree(found, jnp.zeros(()))
