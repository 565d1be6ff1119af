"""Running only what gates open: the work of closed ones is not done.

Each function equals its masked counterpart: what is skipped would have been multiplied by 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.gates._binary import check_k
from jaxprune.gates._layers import kept


def active(saliency: Float[Array, "n"], k: int) -> Int[Array, "k"]:
    """The numbers of the k largest entries, ascending; of ties, the earlier ones.

    Args:
      saliency: of each channel.
      k: how many, 1 to all.

    Returns:
      int32 (k,).

    Raises:
      ValueError: k out of range.

    Example:
      >>> jp.gates.active(jnp.array([3.0, 1.0, 2.0]), 2).tolist()
      [0, 2]
    """
    check_k(k, saliency.shape[-1], "the saliencies")
    return jnp.sort(jax.lax.top_k(saliency, k)[1]).astype(jnp.int32)


def gathered_dense(
    x: Float[Array, "... n_in"],
    kernel: Float[Array, "n_in n_out"],
    *,
    bias: Float[Array, "n_out"] | None = None,
    inputs: Int[Array, "k_in"] | None = None,
    outputs: Int[Array, "k_out"] | None = None,
) -> Float[Array, "... k_out"]:
    """A product of active inputs with active outputs only.

    Args:
      x: all inputs, or just the active ones (k_in of them).
      kernel, bias: of the whole layer.
      inputs, outputs: numbers of the active ones; `None` for all.

    Returns:
      The active outputs; `scattered` puts them in their places.

    Raises:
      ValueError: sizes that do not fit.

    Example:
      >>> x, kernel = jnp.ones((1, 3)), jnp.arange(12.0).reshape(3, 4)
      >>> jp.gates.gathered_dense(x, kernel, outputs=jnp.array([1, 3])).tolist()
      [[15.0, 21.0]]
    """
    x, kernel, bias = _gathered(x, kernel, bias, inputs, outputs, -1)
    y = x @ kernel
    return y if bias is None else y + bias


def _gathered(
    x: Array, kernel: Array, bias: Array | None, inputs: Any, outputs: Any, axis: int
) -> tuple[Array, Array, Array | None]:
    n_in = kernel.shape[-2]
    if inputs is not None:
        if x.shape[axis] not in (n_in, inputs.shape[0]):
            raise ValueError(
                f"x: {x.shape[axis]} channels, expected all {n_in} or the {inputs.shape[0]} active ones"
            )
        kernel = jnp.take(kernel, inputs, axis=-2)
        if x.shape[axis] == n_in != inputs.shape[0]:
            x = jnp.take(x, inputs, axis=axis)
    elif x.shape[axis] != n_in:
        raise ValueError(f"x: {x.shape[axis]} channels, the kernel reads {n_in}")
    if outputs is not None:
        kernel = jnp.take(kernel, outputs, axis=-1)
        bias = None if bias is None else jnp.take(bias, outputs)
    return x, kernel, bias


def gathered_conv(
    x: Float[Array, "b h w n_in"],
    kernel: Float[Array, "kh kw n_in n_out"],
    *,
    bias: Float[Array, "n_out"] | None = None,
    inputs: Int[Array, "k_in"] | None = None,
    outputs: Int[Array, "k_out"] | None = None,
    strides: Sequence[int] = (1, 1),
    padding: Any = "SAME",
) -> Float[Array, "b h w k_out"]:
    """A convolution of active input channels to active output channels only.

    Args:
      x: images with all channels, or just the active ones.
      kernel, bias: of the whole layer.
      inputs, outputs: numbers of the active channels; `None` for all.
      strides, padding: of the convolution.

    Returns:
      The active channels; `scattered` puts them in their places.

    Raises:
      ValueError: sizes that do not fit.

    Example:
      >>> x, kernel = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 8, 16))
      >>> index = jnp.arange(4)
      >>> jp.gates.gathered_conv(x, kernel, inputs=index, outputs=index).shape
      (1, 4, 4, 4)
    """
    x, kernel, bias = _gathered(x, kernel, bias, inputs, outputs, -1)
    y = jax.lax.conv_general_dilated(
        x, kernel, tuple(strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y if bias is None else y + bias


def scattered(
    y: Float[Array, "... k"], index: Int[Array, "k"], size: int
) -> Float[Array, "... size"]:
    """Active channels in their places, 0 in the others. Inverse, on the active ones, of taking them.

    Args:
      y: active channels.
      index: their numbers.
      size: number of all channels.

    Returns:
      All channels.

    Example:
      >>> jp.gates.scattered(jnp.array([5.0, 6.0]), jnp.array([0, 2]), 4).tolist()
      [5.0, 0.0, 6.0, 0.0]
    """
    return jnp.zeros((*y.shape[:-1], size), y.dtype).at[..., index].set(y)


def spread(x: Array, inputs: Any, channels: int) -> Array:
    """All channels of what holds just some of them, if it does."""
    if inputs is None or x.shape[-1] == channels:
        return x
    return scattered(x, inputs, channels)


def open_channels(gates: Array, method: str, k: int | float) -> tuple[Array, Array]:
    """The gates of a batch of one, and the numbers of the open ones; refuses what has no fixed number."""
    if gates.shape[0] != 1:
        raise ValueError(
            f"x: a batch of {gates.shape[0]}; channels are skipped for one example at a time: "
            "jax.lax.map over examples, or route them with jp.gates.route_top_k"
        )
    if method != "top_k":
        raise ValueError(
            f"method: {method!r} opens a varying number of gates; skip with 'top_k', or "
            "use bucketed"
        )
    return gates[0], active(gates[0], kept(k, gates.shape[-1]))


def in_buckets(
    run: Callable[[int], Callable[..., Any]],
    count: Int[Array, ""],
    buckets: Sequence[int],
    *args: Any,
) -> Any:
    """Runs `run(k)(*args)` for the smallest bucket k that holds `count`: sizes that vary, compiled for
    a few.

    Args:
      run: `k -> function`; its result must not depend on k in shape.
      count: how many are active; above the last bucket it counts as that.
      buckets: sizes, ascending.
      *args: of the function.

    Returns:
      Its result.

    Raises:
      ValueError: no buckets, or not ascending.

    Example:
      >>> run = lambda k: lambda x: jnp.sum(x[:k])
      >>> float(jp.gates.in_buckets(run, jnp.array(3), (2, 4, 8), jnp.ones(8)))
      4.0
    """
    sizes = list(buckets)
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"buckets: expected ascending sizes, got {sizes}")
    which = jnp.minimum(jnp.searchsorted(jnp.asarray(sizes), count), len(sizes) - 1)
    return jax.lax.switch(which, [run(k) for k in sizes], *args)


Buckets = Sequence[int | float]
QUARTERS = (0.25, 0.5, 0.75, 1.0)


def bucketed_dense(
    x: Float[Array, "1 ... n_in"],
    kernel: Float[Array, "n_in n_out"],
    gates: Float[Array, "n_out"],
    *,
    bias: Float[Array, "n_out"] | None = None,
    inputs: Float[Array, "n_in"] | None = None,
    buckets: Buckets = QUARTERS,
) -> Float[Array, "1 ... n_out"]:
    """A product with as few inputs and outputs as the smallest buckets that hold the open ones.

    For one example and gates that open any number; `gathered_dense` is for a number known beforehand.

    Args:
      x: all inputs, those of closed ones 0.
      kernel, bias: of the whole layer.
      gates: of the outputs; closed where 0.
      inputs: gates of the inputs; all open by default.
      buckets: sizes, ascending: numbers, or fractions of the channels. The last must hold all.

    Returns:
      All outputs times their gates: `(x @ kernel + bias) * gates`.

    Raises:
      ValueError: more than one example, buckets that do not ascend or do not hold all.

    Example:
      >>> x, kernel = jnp.ones((1, 4)), jnp.ones((4, 3))
      >>> jp.gates.bucketed_dense(x, kernel, jnp.array([1.0, 0.0, 0.5])).tolist()
      [[4.0, 0.0, 2.0]]
    """

    def run(x: Array, ins: Array | None, outs: Array) -> Array:
        return gathered_dense(x, kernel, bias=bias, inputs=ins, outputs=outs)

    return _bucketed(run, x, gates, inputs, buckets)


def bucketed_conv(
    x: Float[Array, "1 h w n_in"],
    kernel: Float[Array, "kh kw n_in n_out"],
    gates: Float[Array, "n_out"],
    *,
    bias: Float[Array, "n_out"] | None = None,
    inputs: Float[Array, "n_in"] | None = None,
    buckets: Buckets = QUARTERS,
    strides: Sequence[int] = (1, 1),
    padding: Any = "SAME",
) -> Float[Array, "1 h w n_out"]:
    """A convolution with as few channels as the smallest buckets that hold the open ones.

    For one example and gates that open any number; `gathered_conv` is for a number known beforehand.

    Args:
      x: an image with all channels, those of closed ones 0.
      kernel, bias: of the whole layer.
      gates, inputs, buckets: see `bucketed_dense`.
      strides, padding: of the convolution.

    Returns:
      All channels times their gates.

    Raises:
      ValueError: more than one example, buckets that do not ascend or do not hold all.

    Example:
      >>> x, kernel = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 1, 4, 3))
      >>> jp.gates.bucketed_conv(x, kernel, jnp.array([1.0, 0.0, 0.5]))[0, 0, 0].tolist()
      [4.0, 0.0, 2.0]
    """

    def run(x: Array, ins: Array | None, outs: Array) -> Array:
        return gathered_conv(
            x, kernel, bias=bias, inputs=ins, outputs=outs, strides=strides, padding=padding
        )

    return _bucketed(run, x, gates, inputs, buckets)


def _bucketed(
    run: Callable[[Array, Array | None, Array], Array],
    x: Array,
    gates: Array,
    inputs: Array | None,
    buckets: Buckets,
) -> Array:
    if x.shape[0] != 1:
        raise ValueError(f"x: one example at a time, got a batch of {x.shape[0]}")
    # open channels first, each side in its own order: any bucket that holds them is a prefix
    order = lambda g: jnp.argsort(g == 0, stable=True).astype(jnp.int32)
    outs, ins = order(gates), None if inputs is None else order(inputs)
    size = gates.shape[0]

    def of_outputs(k: int) -> Callable[..., Array]:
        def of_inputs(j: int) -> Callable[..., Array]:
            def go(x: Array) -> Array:
                index = outs[:k]
                # all inputs stay in their own order, in which `x` is
                some = None if ins is None or j == ins.shape[0] else ins[:j]
                y = run(x, some, index)
                return scattered(y * gates[index].astype(y.dtype), index, size)

            return go

        if inputs is None:
            return of_inputs(0)
        sizes = _sizes(buckets, inputs.shape[0])
        return lambda x: in_buckets(of_inputs, jnp.sum(inputs != 0), sizes, x)

    return in_buckets(of_outputs, jnp.sum(gates != 0), _sizes(buckets, size), x)


def _sizes(buckets: Buckets, n: int) -> list[int]:
    """Buckets as numbers of channels; the last holds all."""
    found = [kept(b, n) for b in buckets]
    if not found or found[-1] != n:
        raise ValueError(f"buckets: the last must hold all {n} channels, got {list(buckets)}")
    return list(dict.fromkeys(found))
