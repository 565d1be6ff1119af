"""Convolutions with quantized kernels.

Kernels are small beside what they are convolved with, so they become numbers in each call. On CPU,
integer convolutions of many channels run several times faster than float ones, and take activations in
8 bits; kernels whose scales do not factor out are split into two 8-bit planes.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.program import Operation, Tracked, run_operation
from jaxprune.quantize import DynamicInput, InputScale, QuantizedArray
from jaxprune.runtime._activations import STEPS, How, Planes, in_planes, rounded, with_known_scale
from jaxprune.runtime._choose import LONGEST, differentiated
from jaxprune.runtime._settle import settled
from jaxprune.share import ClusteredArray
from jaxprune.sparse import SparseArray

_CHANNELS = 16  # integer convolutions of fewer channels are slower than float ones
_WORTH = 96  # multiply-adds for each entry in and out, from which an integer one saves time


def convolution_for(operation: Operation, x: Any, held: Tracked, how: How) -> tuple[str, str]:
    """A lowering's name and the reason."""
    if not isinstance(held.array, QuantizedArray | ClusteredArray | SparseArray):
        return "rounded", "activations are rounded first"
    params = operation.params
    read = params["dimension_numbers"].rhs_spec
    depth = int(np.prod([held.shape[i] for i in read[1:]]))
    groups = params["feature_group_count"] * params["batch_group_count"]
    if jax.default_backend() != "cpu":
        return "converted", "the kernel is made numbers, small beside what it is convolved with"
    kernel = jax.ShapeDtypeStruct(held.shape, x.dtype)
    y = jax.eval_shape(lambda x, k: run_operation(operation, [x, k])[0], x, kernel)
    worth = y.size * depth >= _WORTH * (x.size + y.size)
    if not _in_8_bits(how):
        return "converted", "a float convolution with the kernel made numbers"
    if held.shape[read[1]] < _CHANNELS or groups > 1 or depth > LONGEST or not worth:
        return "converted", "a float convolution: too few channels or products for an integer one"
    if not _separable(held, read[0]):
        return "block_planes", "8-bit activations, and the kernel made numbers and split in planes"
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

    def compute(x: jax.Array, held: Tracked, how: How) -> jax.Array:
        x = settled(x.astype(jnp.float32))
        known = isinstance(how, InputScale)
        planes = with_known_scale(x, how) if known else in_planes(x, example, 1)
        y = _in_planes(operation, planes, held)
        wanted = operation.params["preferred_element_type"] or jnp.result_type(held.array.dtype)
        return settled(y).astype(wanted)

    return differentiated(compute, reference)(x, held, how)


def _separable(held: Tracked, out_axis: int) -> bool:
    """Whether the kernel's codes are integers with one scale for each output channel, or for all."""
    array, axis = held.array, held.order[out_axis] + held.array.ndim
    if not isinstance(array, QuantizedArray):
        return False
    if not array.spec.format.startswith("int") or array.zero_point is not None:
        return False
    shape = array.scale.shape
    return shape[axis] in (1, array.shape[axis]) and all(
        n == 1 for i, n in enumerate(shape) if i != axis
    )


def _in_planes(operation: Operation, planes: Planes, held: Tracked) -> jax.Array:
    numbers = operation.params["dimension_numbers"]
    out_axis = numbers.rhs_spec[0]
    inputs = tuple(i for i in range(len(held.shape)) if i != out_axis)
    if _separable(held, out_axis):
        kernels = [replace(held, array=held.array.levels()).materialize()]
        scale = held.array.scale.astype(jnp.float32)
    else:
        dense = held.materialize().astype(jnp.float32)
        bound = jnp.max(jnp.abs(dense), inputs, keepdims=True, initial=0.0)
        scale = jnp.where(bound == 0, 1.0, bound) / 127.0
        first = jnp.round(dense / scale)
        second = jnp.round((dense / scale - first) * STEPS)
        kernels = [first.astype(jnp.int8), second.astype(jnp.int8)]
    (codes,) = planes.codes
    y, *rest = (_convolve(operation, codes[0], kernel) for kernel in kernels)
    if rest:
        y = y + rest[0] / STEPS
    beside = [1] * y.ndim
    beside[numbers.out_spec[1]] = -1
    y = y * scale.reshape(beside)
    if planes.scale.ndim == 0:
        return y * planes.scale
    per_example = [1] * y.ndim
    per_example[numbers.out_spec[0]] = -1
    return y * planes.scale.reshape(per_example)


def _convolve(operation: Operation, x: jax.Array, kernel: jax.Array) -> jax.Array:
    params = {**operation.params, "preferred_element_type": jnp.dtype(jnp.int32)}
    (y,) = run_operation(replace(operation, params=params), [x, kernel])
    return y.astype(jnp.float32)
