"""A weight as the matrices that multiply features: (matrices, features, outputs), and back.

The layout of the solvers. `matrices` counts stacked layers, experts and the groups of a grouped
convolution, each with a second moment of its own; `features` is what a product sums over, in the order
of the statistics (im2col for convolutions); `outputs` is all the rest.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxprune import _trees
from jaxprune._types import PyTree, Where
from jaxprune.calibration import Stats, stats_leaves


@dataclass(frozen=True)
class Layout:
    """How one leaf lies as matrices.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      lead: how many leading axes stack matrices.
      groups: of a grouped convolution, else 1.
      summed, outer: the axes of features and of outputs, counted from the start.
    """

    path: str
    shape: tuple[int, ...]
    lead: int
    groups: int
    summed: tuple[int, ...]
    outer: tuple[int, ...]

    @property
    def features(self) -> int:
        """How many entries a product sums over."""
        return int(np.prod([self.shape[i] for i in self.summed]))

    @property
    def outputs(self) -> int:
        """Outputs of one matrix."""
        return int(np.prod([self.shape[i] for i in self.outer])) // self.groups

    @property
    def matrices(self) -> int:
        """How many matrices the leaf holds."""
        return int(np.prod(self.shape[: self.lead])) * self.groups

    @property
    def order(self) -> tuple[int, ...]:
        """The leaf's axes as matrices have them: stacks, features, outputs."""
        return (*range(self.lead), *self.summed, *self.outer)

    def split(self, x: Shaped[Array, "..."]) -> Shaped[Array, "matrices features outputs"]:
        """An array of the leaf's shape as matrices. Inverse of `join`."""
        x = jnp.transpose(x, self.order).reshape(-1, self.features, self.groups, self.outputs)
        return jnp.moveaxis(x, 2, 1).reshape(self.matrices, self.features, self.outputs)

    def join(
        self, x: Shaped[Array, "matrices rows outputs"], sizes: tuple[int, ...] | None = None
    ) -> Shaped[Array, "..."]:
        """Matrices in the leaf's layout; `sizes` of the summed axes, where they have others (scales)."""
        own = tuple(self.shape[i] for i in self.summed) if sizes is None else sizes
        rows, outer = int(np.prod(own)), [self.shape[i] for i in self.outer]
        x = jnp.moveaxis(x.reshape(-1, self.groups, rows, self.outputs), 1, 2)
        x = x.reshape(*self.shape[: self.lead], *own, *outer)
        return self.restored(x)

    def restored(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """An array whose axes are in `order`, in the leaf's own."""
        return jnp.transpose(x, np.argsort(self.order).tolist())


def layout_of(path: str, shape: tuple[int, ...], stat: Stats) -> Layout:
    """How a leaf lies as matrices, by what was seen to multiply it.

    Raises:
      ValueError: statistics of a leaf of another shape.
    """
    grouped = int(stat.groups > 1)
    lead = stat.mean.ndim - 1 - grouped
    summed = tuple(sorted(axis % len(shape) for axis in stat.axes))
    outer = tuple(i for i in range(lead, len(shape)) if i not in summed)
    found = Layout(path, shape, lead, stat.groups, summed, outer)
    odd = grouped and (len(outer) != 1 or shape[outer[0]] % stat.groups)
    wanted = (*shape[:lead], *((stat.groups,) if grouped else ()), found.features)
    if odd or stat.mean.shape != wanted:
        raise ValueError(
            f"stats: leaf {path!r} has shape {shape}, its statistics are of {stat.mean.shape[-1]} "
            "features; calibrate again with these params"
        )
    return found


def grams(stat: Stats, layout: Layout) -> Float[Array, "matrices features features"]:
    """The second moments of what multiplies a leaf, one per matrix.

    Raises:
      ValueError: they were not recorded.
    """
    if stat.second_moment is None:
        raise ValueError(
            f"stats: leaf {layout.path!r} has no second moment; calibrate(fn, params, batches, "
            "second_moment=True)"
        )
    n = layout.features
    return stat.second_moment.astype(jnp.float32).reshape(layout.matrices, n, n)


def chosen_leaves(
    params: PyTree, stats: PyTree, where: Where, who: str
) -> tuple[list[str], list[Any], Any, list[Stats], list[bool]]:
    """Paths, leaves, treedef, statistics and which leaves are reconstructed.

    By default all whose inputs were seen. Raises `ValueError` where a leaf that `where` names was not
    seen, or none was, and `TypeError` for compressed leaves.
    """
    paths, leaves, treedef = _trees.flatten(params)
    found = stats_leaves(stats, paths)
    hits = _trees.select(params, where, uses=stats)
    for i, (path, stat) in enumerate(zip(paths, found, strict=True)):
        if not hits[i]:
            continue
        if not stat.axes:
            if where is not None:
                raise ValueError(
                    f"{who}: nothing was seen to multiply leaf {path!r} (its use is {stat.uses.kind!r}); "
                    "leave it out with where=, or quantize and prune it by its values"
                )
            hits[i] = False
    if not any(hits):
        raise ValueError(
            f"{who}: the statistics saw no product with a leaf of params; calibrate the function that "
            "uses them"
        )
    return paths, leaves, treedef, found, hits


def tell_unseen(
    who: str, what: str, pairs: list[tuple[Stats, Layout]], *, stacklevel: int = 3
) -> None:
    """Warns of matrices that no row multiplied."""
    unseen = []
    for stat, layout in pairs:
        empty = int(np.sum(np.asarray(stat.count) == 0))
        if empty:
            unseen.append(f"{layout.path!r} ({empty} of {np.size(stat.count)})")
    if unseen:
        warnings.warn(
            f"{who}: no row of the batches multiplied some matrices of {', '.join(unseen[:3])}; they are "
            f"{what}; calibrate on more batches",
            stacklevel=stacklevel,
        )
