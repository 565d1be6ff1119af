"""Training some parameters in some phases only."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int


class PhasedState(NamedTuple):
    """State of `phased`.

    Attributes:
      step: int32 scalar, updates so far, of any phase; also `.count`, see `SparseState`.
      inner_state: state of the inner transform.
    """

    step: Int[Array, ""]
    inner_state: optax.OptState

    @property
    def count(self) -> Int[Array, ""]:  # ty: ignore[incompatible-property-override]
        """Updates so far."""
        return self.step


def phased(
    inner: optax.GradientTransformation, active: Callable[[Any], Bool[Array, ""]]
) -> optax.GradientTransformationExtraArgs:
    """Run a transform in some steps only; in the others updates are 0 and its state stays as it is.

    With `optax.multi_transform`, gates and network train in phases of their own.

    Args:
      inner: any optax transform.
      active: `step -> bool`, traceable: `jp.schedules.between`, `jp.schedules.alternating`, or any other.

    Returns:
      A transform.

    Raises:
      TypeError: `active` is no function.

    Example:
      >>> params = {"net": jnp.ones(2), "gates": jnp.ones(2)}
      >>> tx = optax.multi_transform({
      ...     "net": jp.optim.phased(optax.sgd(0.5), jp.schedules.between(1)),
      ...     "gates": optax.sgd(0.5),
      ... }, {"net": "net", "gates": "gates"})
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["net"].tolist(), updates["gates"].tolist()
      ([0.0, 0.0], [-0.5, -0.5])
    """
    if not callable(active):
        raise TypeError(f"active: expected a function of the step, got {type(active).__name__}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PhasedState:
        return PhasedState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, PhasedState]:
        new, after = inner.update(updates, state.inner_state, params, **extra)
        now = jnp.asarray(active(state.step), bool)
        still = jax.tree.map(lambda u: jnp.where(now, u, jnp.zeros((), u.dtype)), new)
        kept = jax.tree.map(lambda a, b: jnp.where(now, a, b), after, state.inner_state)
        return still, PhasedState(jnp.asarray(optax.safe_increment(state.step)), kept)

    return optax.GradientTransformationExtraArgs(init, update)
