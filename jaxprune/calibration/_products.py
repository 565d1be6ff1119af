"""The products and convolutions of a program, in the order in which they run."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import _trees
from jaxprune._types import Params
from jaxprune.program import Executor, HookResult, Program, Step, Tracked, is_product, trace_program
from jaxprune.quantize import Spec


class Product(NamedTuple):
    """A weight where it multiplies.

    Attributes:
      path: its path.
      shape: of what is multiplied: without the leading axes that loops map over, and reshaped perhaps.
      batch, free: its axes that are mapped over, and that make features of the result, counted from the
        end; all others are summed.
    """

    path: str
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]


def products_of(program: Program, paths: list[str], leaves: list[Any]) -> list[Product]:
    """Every use of a leaf as one operand of a product, inner programs included."""
    found: list[Product] = []

    def use(step: Step) -> HookResult:
        product = _product(step)
        if product is not None and product not in found:
            found.append(product)
        return HookResult()

    def run(leaves: list[Any], rest: list[Any]) -> list[Any]:
        tracked = [
            Tracked.of(x, p) if jnp.ndim(x) else x for x, p in zip(leaves, paths, strict=True)
        ]
        executor = Executor(use, enters=lambda operation: True)
        return executor.run(program, [*tracked, *rest])[0]

    rest = [program.avals[i] for i in program.inputs[len(leaves) :]]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in rest]
    jax.eval_shape(run, leaves, shapes)
    return found


def _product(step: Step) -> Product | None:
    operation, operands, _ = step
    sides = [i for i, x in enumerate(operands[:2]) if isinstance(x, Tracked)]
    if len(sides) != 1 or not is_product(operation.name):
        return None
    (side,), numbers = sides, operation.params.get("dimension_numbers")
    if numbers is None:
        return None
    tracked = operands[side]
    path, order, shape = tracked.path, tracked.order, tuple(tracked.array.shape)
    if operation.name == "conv_general_dilated":
        return Product(path, shape, (), (order[numbers.rhs_spec[0]],)) if side == 1 else None
    contract, batch = numbers
    used = (*contract[side], *batch[side])
    free = tuple(order[i] for i in range(len(order)) if i not in used)
    return Product(path, shape, tuple(order[i] for i in batch[side]), free)


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
