"""Block-sparse kernels: every tile of outputs reads as many blocks of inputs. Maths on a table.

A kernel of shape (window…, inputs, outputs) is cut into tiles of `t` outputs and blocks of `b` inputs.
The *table*, (tiles, slots), says which blocks a tile reads; values, (window…, tiles, slots * b, t), hold
what they are multiplied by. The table is static, so nothing is looked up at run time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Table = np.ndarray
_FEW = 32  # tiles up to which a convolution runs tile by tile


def tiled_shape(shape: tuple[int, ...], blocks: int, table: Table) -> tuple[int, ...]:
    """Shape of the values of a kernel of `shape` whose inputs are cut into `blocks`."""
    *window, inputs, outputs = shape
    tiles, slots = table.shape
    return (*window, tiles, slots * (inputs // blocks), outputs // tiles)


def to_dense(
    values: Float[Array, "*window tiles depth t"], blocks: int, table: Table
) -> Float[Array, "*window inputs outputs"]:
    """The kernel with zeros outside. Inverse: `from_dense`."""
    *window, tiles, depth, t = values.shape
    size = depth // table.shape[1]
    parts = values.reshape(*window, tiles, table.shape[1], size, t)
    kernel = jnp.zeros((*window, tiles, blocks, size, t), values.dtype)
    kernel = kernel.at[..., np.arange(tiles)[:, None], table, :, :].set(parts)
    return jnp.moveaxis(kernel, -4, -2).reshape(*window, blocks * size, tiles * t)


def from_dense(
    kernel: Float[Array, "*window inputs outputs"], blocks: int, table: Table
) -> Float[Array, "*window tiles depth t"]:
    """The values of a kernel, whatever stands outside. Inverse: `to_dense`."""
    *window, inputs, outputs = kernel.shape
    tiles, slots = table.shape
    size, t = inputs // blocks, outputs // tiles
    cut = jnp.moveaxis(kernel.reshape(*window, blocks, size, tiles, t), -2, -4)
    parts = cut[..., np.arange(tiles)[:, None], table, :, :]
    return parts.reshape(*window, tiles, slots * size, t)


def tiled_dot(
    x: Float[Array, "*rows inputs"],
    values: Float[Array, "tiles depth t"],
    blocks: int,
    table: Table,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*rows outputs"]:
    """`x @ to_dense(values)`, one batched product for each slot."""
    tiles, depth, t = values.shape
    slots = table.shape[1]
    parts = values.reshape(tiles, slots, depth // slots, t)
    lead = x.shape[:-1]
    by_block = jnp.moveaxis(x.reshape(-1, blocks, depth // slots), 1, 0)  # (blocks, rows, size)
    everything = np.arange(blocks)
    y = None
    for slot in range(slots):
        read = table[:, slot]
        operand = by_block if np.array_equal(read, everything) else by_block[read]
        found = jax.lax.dot_general(
            operand, parts[:, slot], (((2,), (1,)), ((0,), (0,))), precision=precision
        )
        y = found if y is None else y + found
    assert y is not None
    return jnp.moveaxis(y, 0, 1).reshape(*lead, tiles * t)


def tiled_conv(
    x: Float[Array, "n *space inputs"],
    values: Float[Array, "*window tiles depth t"],
    blocks: int,
    table: Table,
    convolve: Callable[[Array, Array], Array],
) -> Float[Array, "n *out outputs"]:
    """The convolution with `to_dense(values)`: tile by tile, or dense where tiles are many.

    Convolutions in groups are no faster than dense ones on XLA for CPU, and their gradients far slower.
    """
    tiles = len(table)
    if tiles > _FEW:
        return convolve(x, to_dense(values, blocks, table))
    size = x.shape[-1] // blocks
    block = lambda i: jax.lax.slice_in_dim(x, i * size, (i + 1) * size, axis=-1)
    read = [jnp.concatenate([block(int(i)) for i in row], -1) for row in table]
    return jnp.concatenate([convolve(read[i], values[..., i, :, :]) for i in range(tiles)], -1)


def tiled_rows(
    ids: Int[Array, "*ids"], values: Float[Array, "tiles depth t"], blocks: int, table: Table
) -> Float[Array, "*ids features"]:
    """Columns of `to_dense(values)`: (features, tokens) read at `ids`, without making it."""
    tiles, depth, t = values.shape
    slots = table.shape[1]
    by_token = jnp.moveaxis(values, 1, 2).reshape(tiles * t, slots, depth // slots)
    rows = jnp.take(by_token, ids, axis=0)  # (ids…, slots, size)
    places = jnp.take(jnp.asarray(table), ids // t, axis=0, mode="clip")  # (ids…, slots)
    hot = jax.nn.one_hot(places, blocks, dtype=rows.dtype)
    # each slot goes to a block of its own
    found = jnp.einsum("...sb,...sd->...bd", hot, rows)
    return found.reshape(*ids.shape, blocks * (depth // slots))
