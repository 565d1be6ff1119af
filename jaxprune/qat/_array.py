"""The leaf that trains for quantization."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _leaves
from jaxprune._types import CompressedLeaf, check_float
from jaxprune.quantize import (
    QuantizedArray,
    Spec,
    from_levels,
    integer_range,
    quantize,
    quantize_with,
    reciprocal,
    round_ste,
    scale_gradient,
    scale_of,
    spread,
    to_levels,
)

FIRST = 2.0
"""The learned exponent at which the scale is that of the weight's magnitude: some way from 0, to where
decay pulls, and yet not far."""


@_leaves.register(data=("value", "step"), meta=("spec", "pruned"))
@dataclass(frozen=True)
class QATArray(CompressedLeaf):
    """A weight in training, read as what its quantized form will be.

    All its children are floats that train: any optimizer, decay or average may move them. The scale is
    positive by its parametrisation, `base * 2 ** (step - 2)`, where `base` is LSQ's first step
    `2 mean|w| / sqrt(q)`, at most the range of the weight now. With a zero point, `base` is the whole
    range, and the zero point follows from the weight too.

    Attributes:
      value: the float weight that the optimizer moves.
      step: the exponent of the learned scale, laid out as scales of `QuantizedArray` are; `None`: the
        scale is that of the weight's range, in each step anew.
      spec: the format.
      pruned: weights that are exactly 0 are pruned: they get no gradient, and stay 0 under every
        optimizer that leaves weights without gradients alone.
    """

    value: Array
    step: Array | None
    spec: Spec
    pruned: bool = False

    is_trained: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the weight."""
        return self.value.dtype

    @property
    def scale(self) -> Array:
        """The scale now."""
        return self._grid()[0]

    @property
    def zero_point(self) -> Array | None:
        """The level of 0 now, whole numbers; or `None` (symmetric)."""
        return self._grid()[1]

    def astype(self, dtype: Any) -> "QATArray":
        """The same in another float type."""
        check_float(dtype)
        return QATArray(self.value.astype(dtype), self.step, self.spec, self.pruned)

    def materialize(self) -> Float[Array, "..."]:
        """The weight on its grid, with the values of `converted`. Gradients: to `value` straight through,
        also where it is clipped (the range follows the weight), to `step` as in LSQ.
        """
        x = self._kept()
        scale, zero = self._grid()
        exact = from_levels(
            to_levels(x, reciprocal(scale), zero, self.spec), scale, zero, self.spec, x.dtype
        )
        if self.step is None:
            through = x
        else:
            low, high = integer_range(self.spec)
            scale = scale_gradient(scale, 1.0 / (self.size / scale.size * high) ** 0.5)
            offset = jnp.zeros(()) if zero is None else spread(zero, x.shape, self.spec)
            still = jax.lax.stop_gradient(x)
            spread_scale = spread(scale, x.shape, self.spec)
            learned = round_ste(still, spread_scale, offset, low, high, residual=True)
            through = learned + (x - still)
        return (through + jax.lax.stop_gradient(exact - through)).astype(self.dtype)

    def converted(self) -> QuantizedArray:
        """The quantized weight, which stands for what `materialize` gives."""
        if self.step is None:
            return quantize("value", self._kept(), self.spec)[0]
        scale, zero = self._grid()
        return quantize_with(self._kept(), scale, zero, self.spec)

    def _kept(self) -> Array:
        return jnp.where(self.value != 0, self.value, 0) if self.pruned else self.value

    def _grid(self) -> tuple[Array, Array | None]:
        """Scale and zero point; the gradient of the scale goes to `step` alone."""
        x = jax.lax.stop_gradient(self._kept())
        if self.step is None:
            return scale_of(x, self.spec)
        low, high = integer_range(self.spec)
        x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        exponent = jnp.exp2(self.step.astype(x.dtype) - FIRST)
        if self.spec.symmetric:
            return _first_step(x, self.step.shape, high, self.spec) * exponent, None
        least = jnp.minimum(_reduced(jnp.min, x, self.step.shape, self.spec), 0.0)
        most = jnp.maximum(_reduced(jnp.max, x, self.step.shape, self.spec), 0.0)
        scale = _usable((most - least) / (high - low)) * exponent
        zero = jnp.clip(jnp.round(low - least / jax.lax.stop_gradient(scale)), low, high)
        return scale, zero


def _first_step(x: Array, shape: tuple[int, ...], top: int, spec: Spec) -> Array:
    """`2 mean|w| / sqrt(q)` over the entries of each scale, at most their range."""
    magnitude = jnp.abs(x)
    mean, most = (_reduced(op, magnitude, shape, spec) for op in (jnp.mean, jnp.max))
    return _usable(jnp.minimum(2 * mean / top**0.5, most / top))


def _usable(scale: Array) -> Array:
    return jnp.where(scale > 0, jnp.maximum(scale, jnp.finfo(scale.dtype).tiny), 1.0)


def _reduced(op: Any, x: Array, shape: tuple[int, ...], spec: Spec) -> Array:
    """A reduction over the entries of each scale; of least and largest values, 0 is one besides."""
    if x.size == 0:
        return jnp.zeros(shape, x.dtype)
    axis = spec.padded_axis
    if axis is not None and shape[axis] > 1:  # padding counts in no mean
        n, size = x.shape[axis], spec.group_size or 1
        pads = [(0, shape[axis] * size - n if i == x.ndim + axis else 0) for i in range(x.ndim)]
        there = jnp.pad(jnp.ones_like(x), pads)
        x = jnp.pad(x, pads)
        if op is jnp.mean:
            whole = replace(spec, otherwise="auto")
            total, count = (_reduced(jnp.sum, y, shape, whole) for y in (x, there))
            return total / count
    split = [k for n, m in zip(x.shape, shape, strict=True) for k in (m, n // m)]
    return op(x.reshape(split), tuple(range(1, 2 * x.ndim, 2)))
