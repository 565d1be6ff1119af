"""Patterns: which weights are kept or removed together.

A pattern is a small frozen dataclass with two inverse maps between a leaf's entries and its *units*:
`pool` turns scores per entry into scores per unit, `expand` turns a mask per unit into a mask that
broadcasts against the leaf. `NM` has no units: it constrains which entries may stay.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune import _checks
from jaxprune._types import Masks, PyTree, Scores
from jaxprune._uses import Uses


@runtime_checkable
class Pattern(Protocol):
    """Anything that groups the entries of a leaf into units."""

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` where the pattern does not fit a leaf."""
        ...

    def pool(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Scores per unit from scores per entry. Inverse direction of `expand`."""
        ...

    def expand(self, mask: Bool[Array, "..."], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """A mask that broadcasts to `shape` from a mask per unit. Inverse direction of `pool`."""
        ...


@runtime_checkable
class TreePattern(Protocol):
    """Anything that groups the entries of several leaves into units, such as `jp.structure.Units`."""

    def pool_tree(self, scores: Scores) -> PyTree:
        """Scores per unit, as a tree, from scores per entry. Inverse direction of `expand_tree`."""
        ...

    def expand_tree(self, masks: PyTree) -> Masks:
        """Masks for all entries from masks of units. Inverse direction of `pool_tree`."""
        ...


@dataclass(frozen=True)
class Block:
    """Blocks of entries, kept or removed whole; a block's score is the mean over its entries.

    Blocks lie along the last `len(shape)` axes. At the far edge of an axis that the block does not
    divide, blocks are smaller; the mask always has the leaf's shape.

    Args:
      shape: the block's extent along each of the last axes, positive integers.

    Raises:
      ValueError: an extent below 1, or a leaf with fewer axes than the block.

    Example:
      >>> scores = {"w": jnp.arange(16.0).reshape(4, 4)}
      >>> masks = jp.masks.from_scores(scores, 0.75, pattern=jp.masks.Block((2, 2)))
      >>> masks["w"].astype(int).tolist()
      [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shape:
            raise ValueError("Block.shape: expected at least one extent, got ()")
        for extent in self.shape:
            _checks.positive_int("Block.shape", extent)

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` where the leaf has too few axes."""
        if len(shape) < len(self.shape):
            raise ValueError(
                f"pattern: Block({self.shape}) needs {len(self.shape)} axes, leaf {path!r} has "
                f"shape {shape}; leave it out with where="
            )

    def pool(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Mean score per block."""
        return self._sum(scores) / self._sum(jnp.ones_like(scores))

    def expand(self, mask: Bool[Array, "..."], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """The block mask, each entry repeated over its block and cut to `shape`."""
        for axis, extent in self._axes(len(shape)):
            mask = jnp.repeat(mask, extent, axis=axis)
        return mask[tuple(slice(n) for n in shape)]

    def _axes(self, ndim: int) -> list[tuple[int, int]]:
        return list(zip(range(ndim - len(self.shape), ndim), self.shape, strict=True))

    def _sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        for axis, extent in self._axes(x.ndim):
            count = -(-x.shape[axis] // extent)
            pad = [(0, 0)] * x.ndim
            pad[axis] = (0, count * extent - x.shape[axis])
            x = jnp.pad(x, pad)
            split = (*x.shape[:axis], count, extent, *x.shape[axis + 1 :])
            x = jnp.sum(x.reshape(split), axis=axis + 1)
        return x


@dataclass(frozen=True)
class Channel:
    """Whole slices along one axis; a slice's score is the mean over its entries.

    The mask keeps size-1 axes: `(1, 1, 1, C)` for the output channels of a convolution.

    Args:
      axis: the axis that counts the channels; `-1` is the output axis of Flax kernels. `"free"`: the
        axes that a leaf's uses call free, each layer of a stack apart.

    Raises:
      ValueError: a leaf without that axis.

    Example:
      >>> scores = {"w": jnp.array([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0]])}
      >>> jp.masks.from_scores(scores, 1 / 3, pattern=jp.masks.Channel(-1))["w"].tolist()
      [[False, True, True]]
    """

    axis: int | tuple[int, ...] | Literal["free"] = -1

    def on(self, uses: Uses, ndim: int) -> "Channel":
        """The same with the axes of a leaf for `"free"`."""
        del ndim
        return replace(self, axis=uses.channel_axes) if self.axis == "free" else self

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` where the leaf lacks the axis."""
        for axis in self._axes():
            _check_axis("Channel", axis, path, shape)

    def _axes(self) -> tuple[int, ...]:
        assert not isinstance(self.axis, str), "resolved by `on` before"
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)

    def pool(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Mean score per channel, size-1 axes kept."""
        own = {axis % scores.ndim for axis in self._axes()}
        others = tuple(i for i in range(scores.ndim) if i not in own)
        return jnp.mean(scores, axis=others, keepdims=True)

    def expand(self, mask: Bool[Array, "..."], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """The channel mask as it is: it broadcasts already."""
        del shape
        return mask


@dataclass(frozen=True)
class NM:
    """At most `n` entries kept of every `m` consecutive ones along an axis; NM(2, 4) keeps 2 of 4.

    Where `m` does not divide the axis, the last group is shorter and keeps at most `n` too.

    Args:
      n: entries kept per group, between 1 and `m`.
      m: entries per group.
      axis: the axis along which groups lie. The default, `"contracted"`, is the innermost axis that
        products sum over, which sparse matrix units compress: as a leaf's uses say, else -2, the input
        axis of Flax kernels.

    Raises:
      ValueError: `n` above `m`, or a leaf without that axis.

    Example:
      >>> scores = {"w": jnp.array([[3.0], [1.0], [2.0], [4.0]])}
      >>> jp.masks.from_scores(scores, 0.5, pattern=jp.masks.NM(2, 4))["w"].ravel().tolist()
      [True, False, False, True]

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021,
    https://arxiv.org/abs/2104.08378
    """

    n: int
    m: int
    axis: int | Literal["contracted"] = "contracted"

    def __post_init__(self) -> None:
        if isinstance(self.axis, str):
            _checks.choice("NM.axis", self.axis, ("contracted",))
        _checks.positive_int("NM.n", self.n)
        _checks.positive_int("NM.m", self.m)
        if self.n > self.m:
            raise ValueError(f"NM.n: expected at most m={self.m}, got {self.n}")

    @property
    def sparsity(self) -> float:
        """The fraction removed of whole groups: `1 - n / m`."""
        return 1.0 - self.n / self.m

    def on(self, uses: Uses, ndim: int) -> "NM":
        """The same with the axis of a leaf for `"contracted"`."""
        return replace(self, axis=uses.contracted_axis(ndim)) if self.axis == "contracted" else self

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` where the leaf lacks the axis."""
        assert not isinstance(self.axis, str), "resolved by `on` before"
        _check_axis("NM", self.axis, path, shape)

    def mask(self, scores: Float[Array, "..."]) -> Bool[Array, "..."]:
        """True for the `n` largest scores of each group, ties to the earliest."""
        assert not isinstance(self.axis, str), "resolved by `on` before"
        x = jnp.moveaxis(scores, self.axis, -1)
        length = x.shape[-1]
        pad = [(0, 0)] * (x.ndim - 1) + [(0, -length % self.m)]
        x = jnp.pad(x, pad, constant_values=-jnp.inf)
        groups = x.reshape(*x.shape[:-1], -1, self.m)  # (..., groups, m)
        rank = jnp.zeros(groups.shape, jnp.int32)
        for j in range(self.m):  # m is small: m comparisons of whole arrays beat any sort
            other = groups[..., j : j + 1]
            earlier = jnp.arange(self.m) > j
            rank += (other > groups) | ((other == groups) & earlier)
        mask = (rank < self.n).reshape(x.shape)[..., :length]
        return jnp.moveaxis(mask, -1, self.axis)


def pattern_on(pattern: Any, path: str, shape: tuple[int, ...], uses: Uses) -> Any:
    """A pattern as it is on one leaf: its axes by number, and checked to fit.

    Raises:
      ValueError: the pattern does not fit the leaf.
    """
    on = getattr(pattern, "on", None)
    found = pattern if on is None else on(uses, len(shape))
    if found is not None:
        found.check(path, shape)
    return found


def _check_axis(name: str, axis: int, path: str, shape: tuple[int, ...]) -> None:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"pattern: {name} lies along axis {axis}, which leaf {path!r} of shape {shape} does not "
            "have; give another axis, or leave the leaf out with where="
        )
