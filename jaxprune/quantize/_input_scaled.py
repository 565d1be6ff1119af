"""A quantized leaf whose inputs have factors of their own, as activation-aware quantization leaves it."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import _leaves
from jaxprune._types import CompressedLeaf
from jaxprune.quantize._array import QuantizedArray


@_leaves.register(data=("array", "factor"))
@dataclass(frozen=True)
class InputScaledArray(CompressedLeaf):
    """A quantized array times a factor for each input feature: `array * factor`.

    A product multiplies its other operand by the factor, and runs on the codes.

    Attributes:
      array: a `QuantizedArray`, of the dense shape.
      factor: float32, the dense shape with shared axes of size 1.

    Example:
      >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
      >>> x = jnp.array([[9.0, 0.1, 0.1, 0.1]])
      >>> stats = jp.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> leaf = jp.awq(params, stats, 4, group_size=None)["w"]
      >>> type(leaf).__name__, leaf.factor.shape
      ('InputScaledArray', (4, 1))
    """

    array: QuantizedArray
    factor: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the dense array."""
        return self.array.dtype

    def materialize(self) -> Float[Array, "..."]:
        """The dense array, of `shape` and `dtype`."""
        wide = self.array.astype(np.dtype("float32")).materialize()
        return (wide * self.factor).astype(self.dtype)

    def astype(self, dtype: Any) -> "InputScaledArray":
        """The same codes and factors, standing for an array of another float type."""
        return replace(self, array=self.array.astype(dtype))

    def __getitem__(self, index: int | slice) -> "InputScaledArray":
        """Entries along the leading axis, still quantized; see `QuantizedArray`."""
        one = isinstance(index, (int, np.integer))
        factor = self.factor
        if factor.shape[0] == 1 != self.shape[0]:
            factor = factor[0] if one else factor
        else:
            factor = factor[index]
        return InputScaledArray(self.array[index], factor)

    def block(self, start: Any, size: int) -> "InputScaledArray":
        """`size` entries of the leading axis from `start`, see `QuantizedArray.block`."""
        factor = self.factor
        if factor.shape[0] != 1 or self.shape[0] == 1:
            factor = jax.lax.dynamic_slice_in_dim(factor, start, size)
        return InputScaledArray(self.array.block(start, size), factor)

    def stacked(self) -> "InputScaledArray":
        """With factors for each entry of the leading axis, as loops over it need."""
        n = self.shape[0]
        if self.factor.shape[0] == n:
            return self
        return replace(self, factor=jnp.broadcast_to(self.factor, (n, *self.factor.shape[1:])))

    def check(self) -> None:
        """See `CompressedLeaf`."""
        self.array.check()
        sizes = zip(self.factor.shape, self.shape, strict=False)
        if self.factor.ndim != self.ndim or any(n not in (1, m) for n, m in sizes):
            raise ValueError(f"factors of shape {self.factor.shape} beside {self.shape}")
        super().check()
