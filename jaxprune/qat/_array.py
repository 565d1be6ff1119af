"""The leaf that trains for quantization."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.quantize import (
    QuantizedArray,
    Spec,
    from_levels,
    integer_range,
    on_grid,
    quantize,
    quantize_with,
    reciprocal,
    scale_of,
    slowed,
    spread,
    to_levels,
)

_SMALLEST = 1e-8  # a step that training drove to 0 or below


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "step", "zero_point", "mask"),
    meta_fields=("spec",),
)
@dataclass(frozen=True)
class QATArray:
    """A weight in training, read as what its quantized form will be.

    Attributes:
      value: the float weight that the optimizer moves.
      step: the scale that training learns, laid out as in `QuantizedArray`; `None`: from the weight's
        range, in each step anew.
      zero_point: float whole numbers like `step`, or `None` (symmetric, or from the range).
      mask: True = keep, broadcasting; pruned weights are exactly 0. Or `None`.
      spec: the format.
    """

    value: Array
    step: Array | None
    zero_point: Array | None
    mask: Array | None
    spec: Spec

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
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes held in training."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def materialize(self) -> Float[Array, "..."]:
        """The weight on its grid, with the values of `converted`. Gradients: to `value` as through a
        clip, to `step` as in LSQ.
        """
        x = self._kept()
        scale, zero = self._scale()
        exact = from_levels(
            to_levels(x, reciprocal(scale), zero, self.spec), scale, zero, self.spec, x.dtype
        )
        if self.step is None:
            through = x
        else:
            low, high = integer_range(self.spec)
            step = slowed(scale, 1.0 / (self.size / scale.size * high) ** 0.5)
            offset = jnp.zeros(()) if zero is None else spread(zero, x.shape)
            through = on_grid(x, spread(step, x.shape), offset, low, high, residual=True)
        return through + jax.lax.stop_gradient(exact - through)

    def converted(self) -> QuantizedArray:
        """The quantized weight, which stands for what `materialize` gives."""
        if self.step is None:
            return quantize("value", self._kept(), self.spec)[0]
        scale, zero = self._scale()
        return quantize_with(self._kept(), scale, zero, self.spec)

    def _kept(self) -> Array:
        return self.value if self.mask is None else jnp.where(self.mask, self.value, 0)

    def _scale(self) -> tuple[Array, Array | None]:
        if self.step is None:
            return scale_of(jax.lax.stop_gradient(self._kept()), self.spec)
        zero = None if self.zero_point is None else jax.lax.stop_gradient(self.zero_point)
        return jnp.maximum(self.step, _SMALLEST), zero
