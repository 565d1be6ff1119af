"""Convolutions with quantized kernels.

Kernels are small beside what they are convolved with, so they become numbers in each call. On CPU,
integer convolutions of many channels run several times faster than float ones, and take activations in
8 bits; kernels whose scales do not factor out are split into a high and a low int8 part.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._trees import is_few
from jaxprune.program import Operation, Tracked, run_operation
from jaxprune.quantize import DynamicInput, InputScale
from jaxprune.runtime._activations import (
    STEPS,
    TOP,
    How,
    Int8Split,
    all_mapped,
    hi_lo,
    int8_split,
    rounded,
    with_known_scale,
)
from jaxprune.runtime._barrier import barrier
from jaxprune.runtime._derivatives import differentiated
from jaxprune.runtime._integers import LONGEST
from jaxprune.runtime._rules import has_rule, rule_of

_CHANNELS = 16  # integer convolutions of fewer channels are slower than float ones
_WORTH = 96  # multiply-adds for each entry in and out, from which an integer one saves time


def convolution_for(
    operation: Operation, x: Any, held: Tracked, how: How, platform: str
) -> tuple[str, str]:
    """A lowering's name and the reason."""
    if not (has_rule(held.array) or _channel_codes(operation, held)):
        return "rounded", "activations are rounded first"
    params = operation.params
    read = params["dimension_numbers"].rhs_spec
    depth = int(np.prod([held.shape[i] for i in read[1:]]))
    groups = params["feature_group_count"] * params["batch_group_count"]
    if platform != "cpu":
        return "converted", "the kernel is made numbers, small beside what it is convolved with"
    kernel = jax.ShapeDtypeStruct(held.shape, x.dtype)
    y = jax.eval_shape(lambda x, k: run_operation(operation, [x, k])[0], x, kernel)
    if not _in_8_bits(how):
        return "converted", "a float convolution with the kernel made numbers"
    few = held.shape[read[1]] < _CHANNELS or groups > 1 or depth > LONGEST
    worth = not is_few(x.size, np.inf) or y.size * depth >= _WORTH * (x.size + y.size)
    if few or not worth:
        return "converted", "a float convolution: too few channels or products for an integer one"
    if _channel_codes(operation, held) is None:
        return "int8_split", "8-bit activations, and the kernel made numbers in two int8 parts"
    return "integer", "8-bit activations and codes"


def _in_8_bits(how: How) -> bool:
    """Whether activations are integers in which 0, as padding has it, is 0."""
    known = isinstance(how, InputScale) and how.zero_point is None
    return known or how == DynamicInput("int8")


def convolved(name: str, operation: Operation, x: jax.Array, held: Tracked, how: How) -> jax.Array:
    """The convolution by its lowering. Its derivative is that with the dense kernel."""
    numbers = operation.params["dimension_numbers"]
    example = tuple(i for i in range(x.ndim) if i != numbers.lhs_spec[0])

    def reference(x: jax.Array, held: Tracked, how: How) -> jax.Array:
        kernel = held.materialize().astype(x.dtype)
        (y,) = run_operation(operation, [rounded(x, example, how), kernel])
        return y

    if name in ("converted", "rounded"):
        return reference(x, held, how)
    wanted = operation.params["preferred_element_type"] or jnp.result_type(held.array.dtype)

    def compute(x: jax.Array, held: Tracked, how: How) -> jax.Array:
        x = barrier(x.astype(jnp.float32))

        def fast() -> jax.Array:
            is_known = isinstance(how, InputScale)
            split = with_known_scale(x, how) if is_known else int8_split(x, example, 1)
            return _product(operation, split, held).astype(wanted)

        is_finite = all_mapped(jnp.isfinite(jnp.sum(0.0 * x)))
        y = jax.lax.cond(is_finite, fast, lambda: reference(x, held, how).astype(wanted))
        return barrier(y)

    return differentiated(compute, reference)(x, held, how)


def _channel_codes(operation: Operation, held: Tracked) -> tuple[jax.Array, jax.Array] | None:
    """The kernel's codes and the scale of each output channel, where they are integers with such."""
    axis = held.order[operation.params["dimension_numbers"].rhs_spec[0]]
    return rule_of(held.array).channel_codes(held.array, axis)


def _product(operation: Operation, split: Int8Split, held: Tracked) -> jax.Array:
    numbers = operation.params["dimension_numbers"]
    out_axis = numbers.rhs_spec[0]
    inputs = tuple(i for i in range(len(held.shape)) if i != out_axis)
    exact = _channel_codes(operation, held)
    if exact is not None:
        kernels, scale = [replace(held, array=exact[0]).materialize()], exact[1]
    else:
        dense = held.materialize().astype(jnp.float32)
        bound = jnp.max(jnp.abs(dense), inputs, keepdims=True, initial=0.0)
        scale = jnp.where(bound == 0, 1.0, bound) / TOP
        kernels = list(hi_lo(dense / scale))
    (codes,) = split.codes
    y, *rest = (_convolve(operation, codes[0], kernel) for kernel in kernels)
    if rest:
        y = y + rest[0] / STEPS
    beside = [1] * y.ndim
    beside[numbers.out_spec[1]] = -1
    y = y * scale.reshape(beside)
    if split.scale.ndim == 0:
        return y * split.scale
    per_example = [1] * y.ndim
    per_example[numbers.out_spec[0]] = -1
    return y * split.scale.reshape(per_example)


def _convolve(operation: Operation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    params = {**operation.params, "preferred_element_type": jnp.dtype(jnp.int32)}
    (y,) = run_operation(replace(operation, params=params), [x, kernel])
    return y.astype(jnp.float32)
