"""The products and convolutions of a program, in the order in which they run."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import _trees
from jaxprune._types import Params
from jaxprune.program import Follower, Found, Held, Program, Use, trace_program
from jaxprune.quantize import Spec


class Product(NamedTuple):
    """A weight where it multiplies.

    Attributes:
      path: its path.
      batch, free: its axes that are mapped over, and that make features of the result, counted from the
        end; all others are summed.
    """

    path: str
    batch: tuple[int, ...]
    free: tuple[int, ...]


def products_of(program: Program, paths: list[str], leaves: list[Any]) -> list[Product]:
    """Every use of a leaf as one operand of a product, loops over layers included."""
    found: list[Product] = []

    def use(seen: Use) -> Found:
        product = _product(seen)
        if product is not None and product not in found:
            found.append(product)
        return Found()

    def run(leaves: list[Any], rest: list[Any]) -> list[Any]:
        held = [Held.of(x, p) if jnp.ndim(x) else x for x, p in zip(leaves, paths, strict=True)]
        return Follower(use).run(program, [*held, *rest])[0]

    rest = [program.avals[i] for i in program.inputs[len(leaves) :]]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in rest]
    jax.eval_shape(run, leaves, shapes)
    return found


def _product(seen: Use) -> Product | None:
    operation, operands = seen
    sides = [i for i in (0, 1) if i < len(operands) and isinstance(operands[i], Held)]
    if len(sides) != 1:
        return None
    held, side = operands[sides[0]], sides[0]
    if operation.primitive.name == "conv_general_dilated" and side == 1:
        return Product(
            held.path, (), (held.order[operation.params["dimension_numbers"].rhs_spec[0]],)
        )
    if operation.primitive.name != "dot_general":
        return None
    contract, batch = operation.params["dimension_numbers"]
    used = (*contract[side], *batch[side])
    free = tuple(held.order[i] for i in range(len(held.order)) if i not in used)
    return Product(held.path, tuple(held.order[i] for i in batch[side]), free)


def first_and_last(
    fn: Callable[..., Any],
    params: Params,
    *args: Any,
    spec: Spec | int | None = 8,
    **kwargs: Any,
) -> list[tuple[str, Spec | int | None]]:
    """Rules that keep the first and the last weight of a function at higher precision.

    The layers that read the input and make the output suffer most from few bits. First and last are meant
    in the order of the traced program.

    Args:
      fn: `fn(params, *args, **kwargs)`.
      params: any tree of arrays.
      *args, **kwargs: example inputs; only shapes matter.
      spec: what they are quantized to: a number of bits, a `jp.quantize.Spec`, or `None` to stay dense.

    Returns:
      `[(regex, spec), (regex, spec)]` for `rules=` of `jp.quantize_tree`; one rule where both are one
      leaf, none where nothing multiplies.

    Example:
      >>> fn = lambda p, x: x @ p["z"] @ p["b"] @ p["a"]
      >>> params = {name: jnp.eye(2) for name in "abz"}
      >>> jp.calibration.first_and_last(fn, params, jnp.ones((1, 2)))
      [('z', 8), ('a', 8)]

    Reference: Krishnamoorthi, "Quantizing deep convolutional networks", 2018,
    https://arxiv.org/abs/1806.08342
    """
    paths, leaves, _ = _trees.flatten(params)
    program = trace_program(fn, params, *args, **kwargs)
    used = [product.path for product in products_of(program, paths, leaves)]
    ends = dict.fromkeys([*used[:1], *used[-1:]])
    return [(re.escape(path), spec) for path in ends]
