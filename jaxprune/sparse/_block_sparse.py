"""Block-sparse connectivity: any pattern of tiles, block-diagonal, butterfly; the shape says all."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxprune import _checks
from jaxprune.sparse import _tiles
from jaxprune.sparse._connectivity import Connectivity, Shape


@dataclass(frozen=True)
class Tiles:
    """Block-sparse: every tile of outputs reads as many blocks of inputs. Multiplied block by block.

    Attributes:
      blocks: of inputs.
      reads: for each tile of outputs, the blocks that it reads; as many each.

    Example:
      >>> connectivity = jp.sparse.Tiles(3, ((0, 1), (1, 2)))
      >>> connectivity.values_shape((6, 10))
      (2, 4, 5)
      >>> connectivity.dense(jnp.ones((2, 2, 1)), None, (3, 2)).tolist()
      [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
    """

    blocks: int
    reads: tuple[tuple[int, ...], ...]

    def table(self, shape: Shape) -> tuple[int, np.ndarray]:
        """See `Connectivity`."""
        _checks.positive_int("blocks", self.blocks)
        lengths = {len(row) for row in self.reads}
        if len(lengths) != 1 or any(len(set(row)) != len(row) or not row for row in self.reads):
            raise ValueError(
                "reads: expected different blocks for each tile, as many for all, got rows of "
                f"{sorted(lengths)}"
            )
        table = np.array(self.reads)
        if table.min() < 0 or table.max() >= self.blocks:
            raise ValueError(f"reads: expected blocks in [0, {self.blocks}), got {table.max()}")
        for name, size, parts in (
            ("inputs", shape[-2], self.blocks),
            ("outputs", shape[-1], len(self.reads)),
        ):
            if size % parts:
                raise ValueError(
                    f"blocks: {parts} do not divide {size} {name} of a kernel of {shape}"
                )
        return self.blocks, table

    def values_shape(self, shape: Shape) -> Shape:
        """See `Connectivity`."""
        return _tiles.tiled_shape(shape, *self.table(shape))

    def draw(self, key: jax.Array, shape: Shape) -> None:
        """None: the shape says all."""
        return

    def index_of(self, mask: Bool[Array, "..."]) -> None:
        """None; raises `ValueError` for another mask."""
        _check_mask(self, mask)

    def dense(self, values: Array, index: Array | None, shape: Shape) -> Array:
        """See `Connectivity`."""
        return _tiles.to_dense(values, *self.table(shape))

    def take(self, kernel: Array, index: Array | None) -> Array:
        """See `Connectivity`."""
        return _tiles.from_dense(kernel, *self.table(kernel.shape))


def block_diagonal(blocks: int) -> Tiles:
    """Blocks of inputs that reach a block of outputs each: `1 / blocks` of the weights.

    Args:
      blocks: divide inputs and outputs.

    Returns:
      A `Tiles`.

    Raises:
      ValueError: less than one block.

    Example:
      >>> connectivity = jp.sparse.block_diagonal(2)
      >>> connectivity.values_shape((4, 6))
      (2, 2, 3)
      >>> connectivity.dense(jnp.ones((2, 1, 1)), None, (2, 2)).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    _checks.positive_int("blocks", blocks)
    return Tiles(blocks, tuple((i,) for i in range(blocks)))


def butterfly(blocks: int) -> Tiles:
    """Flat block butterfly: tile `i` reads blocks `i` and all `i ^ 2^s`, as the factors of an FFT do.

    `(log2(blocks) + 1) / blocks` of the weights exist. Every output is reached from every input within
    `log2(blocks)` layers.

    Args:
      blocks: a power of two that divides inputs and outputs.

    Returns:
      A `Tiles`.

    Raises:
      ValueError: no power of two.

    Example:
      >>> connectivity = jp.sparse.butterfly(4)
      >>> connectivity.dense(jnp.ones((4, 3, 1)), None, (4, 4)).astype(int).tolist()
      [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]

    Reference: Chen et al., "Pixelated Butterfly: Simple and Efficient Sparse Training for Neural Network
    Models", 2021, https://arxiv.org/abs/2112.00029
    """
    _checks.positive_int("blocks", blocks)
    if blocks & (blocks - 1):
        raise ValueError(f"blocks: expected a power of two, got {blocks}")
    strides = [0, *(1 << s for s in range(blocks.bit_length() - 1))]
    return Tiles(blocks, tuple(tuple(i ^ stride for stride in strides) for i in range(blocks)))


def _check_mask(connectivity: Connectivity, mask: Bool[Array, "..."]) -> None:
    """Refuses a mask that is not what the shape says."""
    ones = jnp.ones(connectivity.values_shape(mask.shape), jnp.float32)
    expected = connectivity.dense(ones, None, mask.shape) > 0
    if not bool(jnp.array_equal(mask, expected)):
        raise ValueError(
            f"mask: expected the {int(expected.sum())} weights of {connectivity}, got "
            f"{int(jnp.sum(mask))} others; leave connectivity= out to take any mask"
        )
