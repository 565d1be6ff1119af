"""Products, convolutions and look-ups with kernels of fixed connectivity, and their initial values."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.sparse import _tiles
from jaxprune.sparse._connectivity import (
    Connectivity,
    FixedEntries,
    RandomEntries,
    RandomNM,
    Shape,
)

Initializer = Callable[..., Array]


def initial_values(
    init: Initializer,
    key: jax.Array,
    connectivity: Connectivity,
    index: Array | None,
    shape: Shape,
    *,
    dtype: Any = jnp.float32,
    transposed: bool = False,
) -> Array:
    """Draw values with the scale of the connections that exist.

    The initializer draws pieces of a kernel with as many inputs and outputs as each neuron has
    connections, so its fans are right. Where outputs differ in theirs (`FixedEntries`), each is scaled to
    the number of its own.

    Args:
      init: `init(key, shape, dtype)`, of `jax.nn.initializers`.
      key: a PRNG key.
      connectivity: which weights exist.
      index: as `connectivity.draw` gives it.
      shape: of the dense kernel, (window…, inputs, outputs).
      dtype: of the values.
      transposed: the initializer is one of tables, (outputs, inputs).

    Returns:
      Array of `connectivity.values_shape(shape)`.

    Example:
      >>> init, key = jax.nn.initializers.lecun_normal(), jax.random.key(0)
      >>> values = jp.sparse.initial_values(init, key, jp.sparse.block_diagonal(8), None, (512, 512))
      >>> values.shape, round(float(values.std() * 64**0.5), 1)
      ((8, 64, 64), 1.0)
    """
    held = connectivity.values_shape(shape)
    count, window = int(np.prod(held)), shape[:-2]
    taps = int(np.prod(window))
    inputs, outputs = (
        max(round(count / (shape[-1] * taps)), 1),
        max(round(count / (shape[-2] * taps)), 1),
    )
    piece = (*window, outputs, inputs) if transposed else (*window, inputs, outputs)
    number = max(-(-count // int(np.prod(piece))), 1)
    drawn = jax.vmap(lambda k: init(k, piece, dtype))(jax.random.split(key, number))
    if not isinstance(drawn, jax.Array):
        raise TypeError(f"init: expected an array, got {type(drawn).__name__}; shard the values")
    # the pieces are laid out like values: (pieces, window…, inputs, outputs)
    drawn = jnp.swapaxes(drawn, -1, -2) if transposed else drawn
    if connectivity.table(shape) is not None and (number, *drawn.shape[-2:]) == held[-3:]:
        return jnp.moveaxis(drawn, 0, -3)
    values = drawn.reshape(-1)[:count].reshape(held)
    if isinstance(connectivity, FixedEntries | RandomEntries) and index is not None:
        fans = jnp.zeros(shape[-1], jnp.int32).at[index % shape[-1]].add(1)
        scale = jnp.sqrt(inputs * taps / jnp.maximum(fans, 1))[index % shape[-1]]
        return values * scale.astype(dtype)
    return values


def sparse_dot(
    x: Float[Array, "*rows inputs"],
    values: Float[Array, "..."],
    index: Array | None,
    connectivity: Connectivity,
    outputs: int,
    *,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*rows outputs"]:
    """The product with a kernel of fixed connectivity.

    Block-diagonal and butterfly kernels are multiplied block by block; others are made dense first.

    Args:
      x: (rows…, inputs).
      values: of the kernel, see `Connectivity`.
      index: where they are, or `None`.
      connectivity: which weights exist.
      outputs: of the kernel.
      precision: of the product, as in `jax.lax.dot`.

    Returns:
      (rows…, outputs), equal to `x @ connectivity.dense(values, index, shape)` up to rounding.

    Raises:
      ValueError: a connectivity that does not fit the shape.

    Example:
      >>> connectivity, x = jp.sparse.block_diagonal(2), jnp.array([[1.0, 2.0]])
      >>> jp.sparse.sparse_dot(x, jnp.array([[[3.0]], [[5.0]]]), None, connectivity, 2).tolist()
      [[3.0, 10.0]]
    """
    shape = (x.shape[-1], outputs)
    _check_values(values, connectivity, shape)
    found = connectivity.table(shape)
    if found is None:
        return jnp.dot(x, connectivity.dense(values, index, shape), precision=precision)
    return _tiles.tiled_dot(x, values, *found, precision)


def sparse_conv(
    x: Float[Array, "*batch inputs"],
    values: Float[Array, "..."],
    index: Array | None,
    connectivity: Connectivity,
    shape: Shape,
    *,
    strides: int | Sequence[int] = 1,
    padding: Any = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Array:
    """The convolution with a kernel of fixed connectivity.

    Block-diagonal and butterfly kernels connect channels: each pair that exists has a whole window.

    Args:
      x: (batch…, space…, inputs); any number of batch axes, or none.
      values: of the kernel, see `Connectivity`.
      index: where they are, or `None`.
      connectivity: which weights exist.
      shape: of the dense kernel, (window…, inputs, outputs).
      strides, padding, input_dilation, kernel_dilation, precision: as in `flax.linen.Conv`; padding is
        "SAME", "VALID", an integer, or a sequence of integers or of pairs.

    Returns:
      (batch…, space…, outputs).

    Raises:
      ValueError: a connectivity or a padding that does not fit the shape.

    Example:
      >>> x, connectivity = jnp.ones((1, 4, 4, 2)), jp.sparse.block_diagonal(2)
      >>> y = jp.sparse.sparse_conv(x, jnp.ones((3, 3, 2, 1, 1)), None, connectivity, (3, 3, 2, 2))
      >>> y.shape, float(y[0, 1, 1, 0])
      ((1, 4, 4, 2), 9.0)
    """
    _check_values(values, connectivity, shape)
    rank = len(shape) - 2
    if x.ndim < rank + 1:
        raise ValueError(f"x: expected {rank} axes of space and one of channels, got {x.shape}")
    many = lambda n: (n,) * rank if isinstance(n, int) else tuple(n)
    pads = _padding(padding, rank)

    def convolve(x: Array, kernel: Array) -> Array:
        numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, _layout(rank))
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            many(strides),
            pads,
            lhs_dilation=many(input_dilation),
            rhs_dilation=many(kernel_dilation),
            dimension_numbers=numbers,
            precision=precision,
        )

    lead = x.shape[: x.ndim - rank - 1]
    flat = x.reshape(-1, *x.shape[x.ndim - rank - 1 :])
    found = connectivity.table(shape)
    if found is None:
        y = convolve(flat, connectivity.dense(values, index, shape))
    else:
        y = _tiles.tiled_conv(flat, values, *found, convolve)
    return y.reshape(*lead, *y.shape[1:])


def sparse_take(
    ids: Int[Array, "*ids"],
    values: Float[Array, "..."],
    index: Array | None,
    connectivity: Connectivity,
    shape: tuple[int, int],
) -> Float[Array, "*ids features"]:
    """Look up rows of a table of fixed connectivity.

    The table is the transpose of a kernel (features, tokens), so that `sparse_dot` gives the logits of
    all tokens. Rows of `FixedEntries` have no common length: such a table is made dense first.

    Args:
      ids: integers in [-tokens, tokens).
      values: of the kernel, see `Connectivity`.
      index: where they are, or `None`.
      connectivity: which weights exist.
      shape: (features, tokens).

    Returns:
      (ids…, features); NaN for ids out of range, as in `jnp.take`.

    Raises:
      TypeError: ids that are no integers.
      ValueError: a connectivity that does not fit the shape.

    Example:
      >>> connectivity = jp.sparse.block_diagonal(2)  # tokens 0, 1 have feature 0, others feature 1
      >>> values = jnp.arange(1.0, 5.0).reshape(2, 1, 2)
      >>> jp.sparse.sparse_take(jnp.array([1, 2]), values, None, connectivity, (2, 4)).tolist()
      [[2.0, 0.0], [0.0, 3.0]]
    """
    if not jnp.issubdtype(jnp.asarray(ids).dtype, jnp.integer):
        raise TypeError(f"ids: expected integers, got {jnp.asarray(ids).dtype}")
    _check_values(values, connectivity, shape)
    ids = jnp.asarray(ids)
    ids = jnp.where(ids < 0, ids + shape[1], ids)  # from the end, as NumPy counts
    found = connectivity.table(shape)
    if found is not None:
        return _tiles.tiled_rows(ids, values, *found)
    if isinstance(connectivity, RandomNM) and index is not None:
        flat = ids.reshape(-1)
        held, flags = jnp.take(values, flat, axis=-1), jnp.take(index, flat, axis=-1, mode="clip")
        rows = connectivity.compact(held, flags).materialize()
        inside = (flat >= 0) & (flat < shape[1])
        rows = jnp.where(inside[:, None], rows.T, jnp.nan)
        return rows.reshape(*ids.shape, shape[0])
    return jnp.take(connectivity.dense(values, index, shape).T, ids, axis=0)


def _check_values(values: Array, connectivity: Connectivity, shape: Shape) -> None:
    wanted = connectivity.values_shape(shape)
    if values.shape != wanted:
        raise ValueError(
            f"values: expected {wanted} for {connectivity} of a kernel of {shape}, got {values.shape}"
        )


def _layout(rank: int) -> tuple[str, str, str]:
    space = "DHW"[-rank:] if rank <= 3 else "".join(chr(ord("a") + i) for i in range(rank))
    return f"N{space}C", f"{space}IO", f"N{space}C"


def _padding(padding: Any, rank: int) -> Any:
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(
                f"padding: expected 'SAME', 'VALID' or integers, got {padding!r}; "
                "pad the inputs by jnp.pad"
            )
        return padding.upper()
    each = (padding,) * rank if isinstance(padding, int) else tuple(padding)
    if len(each) != rank:
        raise ValueError(
            f"padding: expected {rank} entries, one for each axis of space, got {padding}"
        )
    return [(p, p) if isinstance(p, int) else tuple(p) for p in each]
