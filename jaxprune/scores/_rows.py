"""A weight as rows: one for each output, in which stand the weights that reach it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxprune._uses import Uses


class Layout(NamedTuple):
    """How a leaf is laid out as (stacks, outputs, inputs).

    Attributes:
      order: its axes, stacked ones first, then free ones, then the others.
      shape: of the leaf, in that order.
      sizes: stacks, outputs, inputs.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    sizes: tuple[int, int, int]

    def rows(self, w: Shaped[Array, "..."]) -> Shaped[Array, "stacks outputs inputs"]:
        """The leaf as rows. Inverse: `leaf`."""
        return jnp.transpose(w, self.order).reshape(self.sizes)

    def leaf(self, rows: Shaped[Array, "stacks outputs inputs"]) -> Shaped[Array, "..."]:
        """The leaf again. Inverse: `rows`."""
        return jnp.transpose(
            rows.reshape(self.shape), [self.order.index(a) for a in range(len(self.order))]
        )


def layout_of(shape: tuple[int, ...], uses: Uses) -> Layout:
    """The layout of a leaf of `shape`; without free axes it has one output."""
    ndim = len(shape)
    stacked = [a + ndim for a in uses.stacked]
    free = [a + ndim for a in uses.free if a + ndim not in stacked]
    rest = [a for a in range(ndim) if a not in stacked and a not in free]
    size = lambda axes: int(np.prod([shape[a] for a in axes], dtype=np.int64))
    order = (*stacked, *free, *rest)
    return Layout(order, tuple(shape[a] for a in order), (size(stacked), size(free), size(rest)))
