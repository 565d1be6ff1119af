"""What to quantize to: the number format and the granularity of the scales."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _leaves

FORMATS = ("int8", "int4", "int2", "float8_e4m3fn", "nf4")
_BITS = {"int8": 8, "int4": 4, "int2": 2, "float8_e4m3fn": 8, "nf4": 4}


@_leaves.register_value
@dataclass(frozen=True)
class Spec:
    """How an array is quantized.

    Attributes:
      bits: 8, 4 or 2: integers of that width. Left out where `dtype` is given.
      symmetric: integers in `[-q, q]` with `q = 2^(bits - 1) - 1` and no zero point; else integers in
        `[-q - 1, q]` with a zero point, so that 0 is always exact.
      group_size: entries per scale along the contracted axis -2 (axis -1 of a vector); it must divide
        the axis. `None`: one scale per channel.
      dtype: a format's name instead of `bits`: `"int8"`, `"int4"`, `"int2"`, `"float8_e4m3fn"`,
        `"nf4"`. The last two are symmetric.
      granularity: `"channel"` (one scale per entry of the last axis; three-axis arrays are read as
        stacked matrices and keep their first axis too, as do arrays of five axes and more) or
        `"tensor"` (one scale in all). Not used with `group_size`.
      full_range: symmetric integers in `[-q - 1, q]` with steps of `absmax / (q + 1/2)`, as qwix has
        them: one level more, and the largest weight a little less exact.
      channel_axis: the axis whose entries have scales of their own: -1, for kernels of (in, out), or -2,
        for matrices of (out, in) that are transposed before use. Only without `group_size`.

    Raises:
      ValueError: an unknown format, granularity or group size, or an asymmetric float format.

    Example:
      >>> jp.quantize.Spec(bits=4, group_size=32).format
      'int4'
    """

    bits: int = 8
    symmetric: bool = True
    group_size: int | None = None
    dtype: Any = None
    granularity: str = "channel"
    full_range: bool = False
    channel_axis: int = -1

    def __post_init__(self) -> None:
        if self.dtype is None:
            _checks.choice("bits", self.bits, (8, 4, 2))
        else:
            name = _format_name(self.dtype)
            _checks.choice("dtype", name, FORMATS)
            # one form for each format, so that equal formats are equal specs
            object.__setattr__(self, "bits", _BITS[name])
            object.__setattr__(self, "dtype", None if name.startswith("int") else name)
        if self.group_size is not None:
            _checks.positive_int("group_size", self.group_size)
        _checks.choice("channel_axis", self.channel_axis, (-1, -2))
        if self.channel_axis == -2 and self.group_size is not None:
            raise ValueError("channel_axis: groups lie along axis -2; expected -1 with group_size")
        _checks.choice("granularity", self.granularity, ("channel", "tensor"))
        if not self.symmetric and self.format in ("float8_e4m3fn", "nf4"):
            raise ValueError(
                f"symmetric: {self.format} has no zero point; expected True, got False"
            )

    @property
    def format(self) -> str:
        """The name of the number format."""
        return f"int{self.bits}" if self.dtype is None else self.dtype

    @property
    def width(self) -> int:
        """Bits per entry."""
        return _BITS[self.format]


def _format_name(dtype: Any) -> str:
    if isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype)


def check_fits(spec: Spec, path: str, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` where `spec`'s groups do not divide a leaf."""
    wanted = spec.group_size
    if wanted is None:
        return
    if not shape:
        raise ValueError(f"group_size: leaf {path!r} is a scalar and has no axis to group")
    axis = group_axis(len(shape))
    if shape[axis] % wanted:
        divisors = [d for d in range(1, shape[axis] + 1) if shape[axis] % d == 0]
        near = min(divisors, key=lambda d: abs(d - wanted), default=1)
        raise ValueError(
            f"group_size: {wanted} does not divide axis {axis} of leaf {path!r} with shape "
            f"{shape}; use {near}, None, or leave the leaf out with where= or rules="
        )


def group_axis(ndim: int) -> int:
    """The axis along which groups lie, counted from the end."""
    return -2 if ndim >= 2 else -1


def reduced_axes(spec: Spec, ndim: int) -> tuple[int, ...]:
    """The axes that share a scale, counted from the end; groups aside."""
    if ndim == 0:
        return ()
    if spec.granularity == "tensor" and spec.group_size is None:
        return tuple(range(-ndim, 0))
    if ndim == 1:
        return (-1,)
    if spec.group_size is not None:
        return (-2,)
    kept = {spec.channel_axis} | ({-ndim} if ndim == 3 or ndim >= 5 else set())
    return tuple(axis for axis in range(-ndim, 0) if axis not in kept)


def integer_range(spec: Spec) -> tuple[int, int]:
    """The least and largest integer of an integer format."""
    q = 2 ** (spec.width - 1) - 1
    return (-q, q) if spec.symmetric and not spec.full_range else (-q - 1, q)


NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""Quantiles of the normal distribution (Dettmers et al., QLoRA, 2023, appendix E)."""

NF4_BOUNDS = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2

FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)
