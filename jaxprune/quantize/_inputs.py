"""How what multiplies a weight is quantized, kept beside the weight."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _leaves, _trees
from jaxprune._types import CompressedLeaf, check_float


@_leaves.register(data=("scale", "zero_point"), meta=("bits", "training"))
@dataclass(frozen=True)
class InputScale:
    """A known scale of activations: `(level - zero_point) * scale`.

    Attributes:
      scale: float, a scalar; (layers,) beside a stack of layers.
      zero_point: float like `scale`, rounded when read; or `None` (the level 0 is 0).
      bits: 2 to 8; levels in `[-q, q]`, `q = 2^(bits - 1) - 1`, with a zero point in `[-q - 1, q]`.
      training: which gradient scale and zero point get: `"fixed"` (none: an optimizer's decay would move
        them all the same), `"lsq"`, or `"pact"` (from clipped activations only). That of the zero point
        comes from clipped activations, as in LSQ+ (https://arxiv.org/abs/2004.09576).

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

    @property
    def step(self) -> Array:
        """The scale, positive wherever training moves it."""
        return self.scale if self.training == "fixed" else _positive(self.scale)

    @property
    def zero(self) -> Array:
        """The level of 0, a whole number in the range wherever training moves it; gradients pass."""
        if self.zero_point is None:
            return jnp.zeros(())
        inside = jnp.clip(self.zero_point, *self.range)
        return inside + jax.lax.stop_gradient(jnp.round(inside) - inside)

    def fixed(self) -> "InputScale":
        """The same, no longer trained."""
        zero = None if self.zero_point is None else self.zero
        return InputScale(self.step, zero, self.bits)

    def rounded(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`x` on the grid. Its gradient is that of a clip; that of the scale, see `training`."""
        low, high = self.range
        zero = self.zero.astype(x.dtype)
        scale = self.step.astype(x.dtype)
        if self.training == "fixed":
            scale, zero = jax.lax.stop_gradient((scale, zero))
        elif self.training == "lsq":
            scale = scale_gradient(scale, 1.0 / (max(x.size, 1) * high) ** 0.5)
        return round_ste(x, scale, zero, low, high, residual=self.training == "lsq")

    def codes(self, x: Float[Array, "..."]) -> Array:
        """Levels, as int8."""
        return jnp.clip(jnp.round(x / self.step + self.zero), *self.range).astype(jnp.int8)


def _positive(x: Array) -> Array:
    """The absolute value, at least the smallest normal number, with a gradient at 0 too."""
    sign = jax.lax.stop_gradient(jnp.where(x < 0, -1.0, 1.0).astype(x.dtype))
    return jnp.maximum(x * sign, jnp.finfo(x.dtype).smallest_normal)


def scale_gradient(x: Array, factor: float) -> Array:
    """`x`, with a gradient `factor` times as large."""
    return x * factor + jax.lax.stop_gradient(x * (1.0 - factor))


def round_ste(
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


@_leaves.register(data=(), meta=("dtype",))
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


@_leaves.register(data=("weight", "input"))
@dataclass(frozen=True)
class ActivationQuantized(CompressedLeaf):
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

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return _trees.dense(self.weight)

    def astype(self, dtype: Any) -> "ActivationQuantized":
        """The same with a weight of another float type."""
        check_float(dtype)
        return self.with_weight(self.weight.astype(dtype))

    def with_weight(self, weight: Any) -> "ActivationQuantized":
        """Another weight beside the same input."""
        return replace(self, weight=weight)


def tell_fixed_scales(paths: list[str], leaves: list[Any]) -> None:
    """Warns of fixed input scales beside weights that train: floats that no gradient holds in place."""
    odd = [
        path
        for path, leaf in zip(paths, leaves, strict=True)
        if isinstance(leaf, ActivationQuantized)
        and isinstance(leaf.input, InputScale)
        and (leaf.input.training, getattr(leaf.weight, "is_trained", False)) == ("fixed", True)
    ]
    if odd:
        more = ", …" if len(odd) > 1 else ""
        warnings.warn(
            f"training: the input scale of leaf {odd[0]!r}{more} is fixed, and a float of the tree, so "
            "that weight decay and averages move it without a gradient; learn it, "
            "jp.quantize_activations(tree, stats, training='lsq'), or add it after training",
            stacklevel=3,
        )
