"""Rounding rows to a grid of levels, with scales known before or found on the way."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.quantize import (
    Spec,
    from_levels,
    least_squares_scale,
    reciprocal,
    scale_of,
    spread,
    to_levels,
)
from jaxprune.reconstruct._columns import sweep
from jaxprune.reconstruct._matrices import Layout


class Grid(NamedTuple):
    """Scales of a matrix, one per group of its features and output.

    Attributes:
      scale, zero: (groups, outputs); `zero` is `None` for symmetric formats.
      group: (features,), which group each feature has.
    """

    scale: Float[Array, "groups outputs"]
    zero: Float[Array, "groups outputs"] | None
    group: Int[Array, "features"]


def on_grid(x: Array, grid: Grid, index: Int[Array, ""], spec: Spec) -> Array:
    """A row rounded to its levels."""
    g = grid.group[index]
    scale, zero = grid.scale[g], None if grid.zero is None else grid.zero[g]
    levels = to_levels(x, reciprocal(scale), zero, spec)
    return from_levels(levels, scale, zero, spec, x.dtype)


@dataclass(frozen=True)
class GroupScales:
    """Scales of groups that begin in a block, from the weights as they are by then.

    Attributes:
      spec: the format of a group, one scale per output.
      size: features per group; 0 where all scales are known.
      search: whether scales have the least squared error, else reach the largest magnitude.
    """

    spec: Spec
    size: int
    search: bool

    def update(self, w: Array, weights: Array, start: Int[Array, ""], grid: Grid) -> Grid:
        """The grid with the scales of the group that begins at `start`, if one does."""
        if not self.size:
            return grid

        def begin(grid: Grid) -> Grid:
            rows = jax.lax.dynamic_slice(w, (start, 0), (self.size, w.shape[1]))
            each = jax.lax.dynamic_slice(weights, (start,), (self.size,))[:, None]
            if self.search:
                scale, zero = least_squares_scale(rows, self.spec, each)
            else:
                scale, zero = scale_of(rows, self.spec)
            at = (start // self.size, 0)
            put = lambda into, x: jax.lax.dynamic_update_slice(into, x.astype(into.dtype), at)
            zeros = None if grid.zero is None else put(grid.zero, zero)
            return grid._replace(scale=put(grid.scale, scale), zero=zeros)

        return jax.lax.cond(start % self.size == 0, begin, lambda grid: grid, grid)


@dataclass(frozen=True)
class Nearest:
    """Every row to its nearest levels."""

    spec: Spec
    scales: GroupScales
    weights: Any
    keep: Any  # (features, outputs) bools, or None: all

    def at_block(self, w: Array, start: Int[Array, ""], carried: Grid) -> Grid:
        """New groups."""
        return self.scales.update(w, self.weights, start, carried)

    def at_step(self, rows: Array, start: Int[Array, ""], carried: Grid) -> Grid:
        """Nothing."""
        del rows, start
        return carried

    def row(self, x: Array, index: Int[Array, ""], carried: Grid) -> Array:
        """The nearest levels, 0 for what is pruned."""
        found = on_grid(x, carried, index, self.spec)
        return found if self.keep is None else jnp.where(self.keep[index], found, 0.0)


@partial(jax.jit, static_argnames=("spec", "size", "search", "block"))
def round_matrix(
    w: Float[Array, "features outputs"],
    u: Float[Array, "features features"],
    grid: Grid,
    keep: Bool[Array, "features outputs"] | None,
    *,
    spec: Spec,
    size: int,
    search: bool,
    block: int,
) -> tuple[Float[Array, "features outputs"], Grid]:
    """A matrix on the grid, with the least error of its outputs that one pass finds (GPTQ)."""
    weights = 1.0 / jnp.square(jnp.diagonal(u))
    rounding = Nearest(spec, GroupScales(spec, size, search), weights, keep)
    return sweep(w, u, rounding, grid, block=block)


def scales_before(
    x: Array, gram: Array, layout: Layout, spec: Spec, damping: float | None
) -> tuple[Array, Array | None]:
    """Scales in the leaf's layout, of the weights as they are: of least squared error, with `damping`.

    What is damped weighs a little where it never acted, so that it is not clipped at will.
    """
    if damping is None:
        return scale_of(x, spec)
    each = jnp.diagonal(gram, axis1=-2, axis2=-1)[..., None]
    each = each + max(damping, 1e-3) * jnp.mean(each, (-2, -1), keepdims=True)
    each = jnp.where(jnp.any(each > 0, (-2, -1), keepdims=True), each, 1.0)
    weights = layout.join(jnp.broadcast_to(each, (*each.shape[:-1], layout.outputs)))
    return least_squares_scale(x, spec, weights)


def per_entry(
    known: tuple[Array, Array | None], layout: Layout, spec: Spec
) -> tuple[Array, Array | None]:
    """Scales and zero points of every entry, as matrices."""
    full = lambda y: layout.split(jnp.broadcast_to(spread(y, layout.shape, spec), layout.shape))
    scale, zero = known
    return full(scale), None if zero is None else full(zero)


def known_grid(
    full: tuple[Array, Array | None], number: int, ranks: Int[Array, "features"], size: int
) -> Grid:
    """The grid of one matrix, of scales per entry, its features in another order and filled to `size`."""
    scale, zero = full
    rows = jnp.minimum(jnp.arange(size), ranks.size - 1)
    return Grid(scale[number][ranks], None if zero is None else zero[number][ranks], rows)


def of_rows(spec: Spec) -> Spec:
    """The format of a row whose entries have a scale each."""
    return replace(
        spec,
        group_size=None,
        group_axis=None,
        channel_axis=(-1,),
        granularity="channel",
        otherwise="auto",
    )
