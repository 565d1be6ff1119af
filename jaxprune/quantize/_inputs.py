"""How what multiplies a weight is quantized, kept beside the weight."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _trees


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("scale", "zero_point"),
    meta_fields=("bits", "training"),
)
@dataclass(frozen=True)
class InputScale:
    """A known scale of activations: `(level - zero_point) * scale`.

    Attributes:
      scale: float, a scalar; (layers,) beside a stack of layers.
      zero_point: float like `scale`, whole numbers; or `None` (the level 0 is 0).
      bits: 2 to 8; levels in `[-q, q]`, `q = 2^(bits - 1) - 1`, with a zero point in `[-q - 1, q]`.
      training: which gradient the scale gets: `"fixed"` (none), `"lsq"`, or `"pact"` (from clipped
        activations only).

    Example:
      >>> how = jp.quantize.InputScale(jnp.float32(0.5), None, bits=4)
      >>> how.rounded(jnp.array([0.6, -9.0])).tolist(), how.codes(jnp.array([0.6, -9.0])).tolist()
      ([0.5, -3.5], [1, -7])
    """

    scale: Array
    zero_point: Array | None
    bits: int
    training: str = "fixed"

    @property
    def range(self) -> tuple[int, int]:
        """The least and largest level."""
        q = 2 ** (self.bits - 1) - 1
        return (-q, q) if self.zero_point is None else (-q - 1, q)

    def rounded(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`x` on the grid. Its gradient is that of a clip; that of the scale, see `training`."""
        low, high = self.range
        zero = (
            jnp.zeros((), x.dtype) if self.zero_point is None else self.zero_point.astype(x.dtype)
        )
        scale = self.scale.astype(x.dtype)
        if self.training == "fixed":
            scale = jax.lax.stop_gradient(scale)
        elif self.training == "lsq":
            scale = slowed(scale, 1.0 / (max(x.size, 1) * high) ** 0.5)
        return on_grid(x, scale, zero, low, high, residual=self.training == "lsq")

    def codes(self, x: Float[Array, "..."]) -> Array:
        """Levels, as int8."""
        zero = 0.0 if self.zero_point is None else self.zero_point
        return jnp.clip(jnp.round(x / self.scale + zero), *self.range).astype(jnp.int8)


def slowed(x: Array, factor: float) -> Array:
    """`x`, with a gradient `factor` times as large."""
    return x * factor + jax.lax.stop_gradient(x * (1.0 - factor))


def on_grid(
    x: Array, scale: Array, zero: Array, low: int, high: int, *, residual: bool
) -> Float[Array, "..."]:
    """`x` rounded to a grid. Gradients: to `x` inside the range; to `scale` what clipped entries say,
    and, with `residual`, what rounding errors say (Esser et al., LSQ, 2020).
    """
    ratio = x / scale + zero
    inside = jnp.clip(ratio, low, high)
    level = inside + jax.lax.stop_gradient(jnp.round(inside) - inside)
    if residual:
        return (level - zero) * scale
    # inside the range the gradient to the scale cancels: (x / scale) * scale
    error = jax.lax.stop_gradient((jnp.round(inside) - inside) * scale)
    return (inside - zero) * scale + error


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("dtype",))
@dataclass(frozen=True)
class DynamicInput:
    """Activations quantized as they come, with one scale per row (token).

    Attributes:
      dtype: `"int8"` or `"float8_e4m3fn"`.

    Example:
      >>> jp.quantize.DynamicInput().dtype
      'int8'
    """

    dtype: str = "int8"


@partial(jax.tree_util.register_dataclass, data_fields=("weight", "input"), meta_fields=())
@dataclass(frozen=True)
class ActivationQuantized:
    """A weight whose other operand is quantized too, when `jp.compressed` runs it.

    Attributes:
      weight: a dense or compressed array.
      input: an `InputScale` known beforehand (static), or a `DynamicInput`.

    Example:
      >>> tree = jp.quantize_activations(jp.quantize_tree({"w": jnp.ones((4, 2))}), mode="dynamic")
      >>> tree["w"].input, tree["w"].shape
      (DynamicInput(dtype='int8'), (4, 2))
    """

    weight: Any
    input: InputScale | DynamicInput

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight."""
        return self.weight.dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the dense weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the dense weight."""
        return int(self.weight.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and of the scales of its input."""
        own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.input))
        return int(self.weight.nbytes) + own

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return _trees.dense(self.weight)

    def with_weight(self, weight: Any) -> "ActivationQuantized":
        """Another weight beside the same input."""
        return replace(self, weight=weight)
