"""One pass over the features of a matrix, each rounded or removed and its error spread on the rest.

The recursion of optimal brain surgery in the order of the features: with `u` from `inverse_factor`, what
feature `j` loses, `e = (w_j - y_j) / u_jj`, is taken from all later ones, `w_k -= u_jk e`. In blocks, so
that most of the work is matrix products: within a block the rows are made when they are due, from the
errors of the rows before them, and the rows behind the block change once.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@runtime_checkable
class Rounding(Protocol):
    """What rows become; its methods are traced."""

    def at_block(self, w: Array, start: Int[Array, ""], carried: Any) -> Any:
        """Called at each block with the whole matrix as it is then, to choose scales or masks."""
        ...

    def at_step(self, rows: Array, start: Int[Array, ""], carried: Any) -> Any:
        """Called before some rows change, with these rows as they are then."""
        ...

    def row(self, x: Array, index: Int[Array, ""], carried: Any) -> Array:
        """What one row becomes."""
        ...


def sweep(
    w: Float[Array, "features outputs"],
    u: Float[Array, "features features"],
    rounding: Rounding,
    carried: Any,
    *,
    block: int,
    step: int = 1,
) -> tuple[Float[Array, "features outputs"], Any]:
    """Rows changed one after another, the later ones made up for it.

    Args:
      w: the matrix, features first; `block` divides them.
      u: upper triangular, see `inverse_factor`.
      rounding: what becomes of rows.
      carried: what its methods hand on: scales, masks.
      block: features per block, a multiple of `step`.
      step: rows that `at_step` sees together.

    Returns:
      The changed matrix, and what was carried.
    """
    features, outputs = w.shape

    def one_block(b: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
        w, carried = state
        start = b * block
        rows = jax.lax.dynamic_slice(w, (start, 0), (block, outputs))
        corner = jax.lax.dynamic_slice(u, (start, start), (block, block))
        carried = rounding.at_block(w, start, carried)

        def some_rows(i: Array, state: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            done, errors, carried = state
            at = i * step
            # errors of rows that are not due yet are zero, as u is below its diagonal
            pulls = jax.lax.dynamic_slice(corner, (0, at), (block, step))
            now = jax.lax.dynamic_slice(rows, (at, 0), (step, outputs)) - pulls.T @ errors
            carried = rounding.at_step(now, start + at, carried)
            small = jax.lax.dynamic_slice(corner, (at, at), (step, step))
            made, lost = _in_turn(now, small, rounding, start + at, carried)
            done = jax.lax.dynamic_update_slice(done, made, (at, 0))
            return done, jax.lax.dynamic_update_slice(errors, lost, (at, 0)), carried

        empty = jnp.zeros_like(rows)
        state = jax.lax.fori_loop(0, block // step, some_rows, (empty, empty, carried))
        done, errors, carried = state
        behind = jax.lax.dynamic_slice(u, (start, 0), (block, features))
        w = w - behind.T @ errors  # nothing before the block: u is upper triangular
        return jax.lax.dynamic_update_slice(w, done, (start, 0)), carried

    return jax.lax.fori_loop(0, features // block, one_block, (w, carried))


def _in_turn(
    now: Float[Array, "step outputs"],
    u: Float[Array, "step step"],
    rounding: Rounding,
    start: Int[Array, ""],
    carried: Any,
) -> tuple[Float[Array, "step outputs"], Float[Array, "step outputs"]]:
    """A few rows, one by one: what they become, and their errors."""
    made, lost = [], []
    for k in range(now.shape[0]):
        x = now[k] - sum((u[j, k] * lost[j] for j in range(k)), jnp.zeros(()))
        y = rounding.row(x, start + k, carried)
        made.append(y)
        lost.append((x - y) / u[k, k])
    return jnp.stack(made), jnp.stack(lost)
