"""How far quantized weights are from what they stand for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from jaxprune import _trees
from jaxprune._types import Params, PyTree, is_compressed


class Error(NamedTuple):
    """The error of one leaf.

    Attributes:
      rms: root of the mean squared difference.
      relative: norm of the difference over the norm of the weight; 0 where both are.
      largest: largest absolute difference.
      sqnr_db: signal to quantization noise, in decibels.
      bits: stored bits per entry, scales included.

    Example:
      >>> params = {"w": jnp.array([[1.0, -0.5], [0.25, 2.0]])}
      >>> jp.quantize.errors(params, jp.quantize_tree(params))["w"].sqnr_db > 40
      True
    """

    rms: float
    relative: float
    largest: float
    sqnr_db: float
    bits: float


@jax.jit
def _measure(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    difference = x - y
    squares = jnp.mean(difference**2), jnp.mean(x**2)
    return jnp.stack([*squares, jnp.max(jnp.abs(difference), initial=0.0)])


def errors(params: Params, compressed: PyTree) -> dict[str, Error]:
    """The error of every compressed leaf, by path: for reports, and for choosing bits leaf by leaf.

    Args:
      params: dense parameters.
      compressed: the same tree with compressed leaves, of any kind.

    Returns:
      `{path: Error}`, in flatten order.

    Raises:
      ValueError: trees that differ.

    Example:
      >>> params = {"w": jnp.array([[1.0, -0.5], [0.25, 2.0]])}
      >>> found = jp.quantize.errors(params, jp.quantize_tree(params, bits=4))
      >>> found["w"].largest < 0.15, round(found["w"].bits)
      (True, 20)
    """
    paths, leaves, _ = _trees.flatten(params)
    names, small, _ = _trees.flatten(_trees.resolve_ties(compressed))
    if names != paths:
        odd = sorted(set(names) ^ set(paths))[:3]
        raise ValueError(f"compressed: another tree than params ({odd} differ)")
    found = {}
    for path, x, y in zip(paths, leaves, small, strict=True):
        if not is_compressed(y):
            continue
        noise, signal, largest = (float(v) for v in _measure(_trees.dense(x), y.materialize()))
        ratio = noise / signal if signal else 0.0
        decibels = 10 * float(jnp.log10(1 / ratio)) if ratio else float("inf")
        bits = 8 * y.nbytes / max(y.size, 1)
        found[path] = Error(noise**0.5, ratio**0.5, largest, decibels, bits)
    return found


def errors_table(found: dict[str, Error]) -> Table:
    """The errors as a `rich` table, the largest relative one first.

    Args:
      found: of `errors`.

    Returns:
      A table for `rich.print`.

    Example:
      >>> params = {"w": jnp.array([[1.0, -0.5], [0.25, 2.0]])}
      >>> jp.quantize.errors_table(jp.quantize.errors(params, jp.quantize_tree(params))).row_count
      1
    """
    table = Table(title="Errors of compressed leaves")
    for column in ("leaf", "relative", "rms", "largest", "SQNR (dB)", "bits"):
        table.add_column(column, justify="left" if column == "leaf" else "right")
    for path, e in sorted(found.items(), key=lambda item: -item[1].relative):
        table.add_row(
            path,
            f"{e.relative:.2%}",
            f"{e.rms:.2e}",
            f"{e.largest:.2e}",
            f"{e.sqnr_db:.1f}",
            f"{e.bits:.2f}",
        )
    return table
