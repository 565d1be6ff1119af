"""Rows of which some entries are removed, chosen as the recursion reaches them."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.masks import NM
from jaxprune.quantize import Spec
from jaxprune.reconstruct._columns import sweep
from jaxprune.reconstruct._pick import smallest
from jaxprune.reconstruct._rounding import Grid, on_grid


class Kept(NamedTuple):
    """What is carried along the rows.

    Attributes:
      mask: (features, outputs), True = keep, as far as chosen.
      grid: of what is kept, where it is quantized too.
    """

    mask: Bool[Array, "features outputs"]
    grid: Grid | None


@dataclass(frozen=True)
class Choice:
    """What is removed.

    Attributes:
      n, m: at most n of m consecutive features stay; 0 where blocks choose.
      along: whether these m lie along features; else along outputs.
      unit: extent, in features and outputs, of the pieces that blocks choose among.
    """

    n: int = 0
    m: int = 0
    along: bool = True
    unit: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Removing:
    """Rows without what costs least: `w² / u_jj²`, the error that the rest cannot make up for."""

    choice: Choice
    block: int
    features: int
    diagonal: Any
    counts: Any
    spec: Spec | None

    def at_block(self, w: Array, start: Int[Array, ""], carried: Kept) -> Kept:
        """The mask of a block, by count, or of its rows, along outputs."""
        choice = self.choice
        if choice.m and choice.along:
            return carried
        rows = jax.lax.dynamic_slice(w, (start, 0), (self.block, w.shape[1]))
        costs = self._costs(rows, start)
        if choice.m:
            keep = NM(choice.n, choice.m, -1).mask(costs)
        else:
            count = self.counts[start // self.block]
            keep = ~_in_units(costs, choice.unit, count)
        mask = jax.lax.dynamic_update_slice(carried.mask, keep, (start, 0))
        return carried._replace(mask=mask)

    def at_step(self, rows: Array, start: Int[Array, ""], carried: Kept) -> Kept:
        """The mask of groups of m features."""
        choice = self.choice
        if not (choice.m and choice.along):
            return carried
        keep = NM(choice.n, choice.m, 0).mask(self._costs(rows, start))
        return carried._replace(mask=jax.lax.dynamic_update_slice(carried.mask, keep, (start, 0)))

    def row(self, x: Array, index: Int[Array, ""], carried: Kept) -> Array:
        """What is kept, on its grid if there is one."""
        grid, spec = carried.grid, self.spec
        kept = x if grid is None or spec is None else on_grid(x, grid, index, spec)
        return jnp.where(carried.mask[index], kept, 0.0)

    def _costs(self, rows: Array, start: Int[Array, ""]) -> Array:
        each = jax.lax.dynamic_slice(self.diagonal, (start,), (rows.shape[0],))
        costs = jnp.square(rows / each[:, None])
        # rows that fill the last block are no features: never counted, never kept of m
        real = (start + jnp.arange(rows.shape[0]) < self.features)[:, None]
        return jnp.where(real, costs, -1.0 if self.choice.m else jnp.inf)


def _in_units(
    costs: Float[Array, "rows outputs"], unit: tuple[int, int], count: Int[Array, ""]
) -> Bool[Array, "rows outputs"]:
    """The entries of the `count` pieces that cost least."""
    if unit == (1, 1):
        return smallest(costs, count)
    rows, outputs = costs.shape
    a, b = unit
    pooled = costs.reshape(rows // a, a, outputs // b, b).sum((1, 3))
    found = smallest(pooled, count)
    return jnp.repeat(jnp.repeat(found, a, 0), b, 1)


@partial(jax.jit, static_argnames=("choice", "spec", "features", "block", "step"))
def prune_matrix(
    w: Float[Array, "features outputs"],
    u: Float[Array, "features features"],
    counts: Int[Array, "blocks"],
    grid: Grid | None,
    *,
    choice: Choice,
    spec: Spec | None,
    features: int,
    block: int,
    step: int,
) -> tuple[Float[Array, "features outputs"], Bool[Array, "features outputs"]]:
    """A matrix with entries removed and the others changed, and what is kept (SparseGPT)."""
    removing = Removing(choice, block, features, jnp.diagonal(u), counts, spec)
    carried = Kept(jnp.ones(w.shape, bool), grid)
    made, carried = sweep(w, u, removing, carried, block=block, step=step)
    return made, carried.mask
