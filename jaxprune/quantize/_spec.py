"""What to quantize to: the number format and the granularity of the scales."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _leaves
from jaxprune._uses import Uses, conventions

FORMATS = ("int8", "int4", "int2", "float8_e4m3fn", "nf4")
OTHERWISE = ("auto", "pad", "channel", "dense", "error")
_BITS = {"int8": 8, "int4": 4, "int2": 2, "float8_e4m3fn": 8, "nf4": 4}


@_leaves.register_value
@dataclass(frozen=True)
class Spec:
    """How an array is quantized.

    Attributes:
      bits: 8, 4 or 2: integers of that width. Left out where `dtype` is given.
      symmetric: integers in `[-q, q]` with `q = 2^(bits - 1) - 1` and no zero point; else integers in
        `[-q - 1, q]` with a zero point, so that 0 is always exact.
      group_size: entries per scale along `group_axis`; every other axis keeps scales of its own.
        `None`: one scale per channel.
      dtype: a format's name instead of `bits`: `"int8"`, `"int4"`, `"int2"`, `"float8_e4m3fn"`,
        `"nf4"`. The last two are symmetric.
      granularity: `"channel"` (one scale per entry of the channel axes) or `"tensor"` (one scale in all,
        of stacked layers one each). Not with `group_size`.
      full_range: symmetric integers in `[-q - 1, q]` with steps of `absmax / (q + 1/2)`, as qwix has
        them: one level more, and the largest weight a little less exact.
      channel_axis: the axis, or axes, whose entries have scales of their own, counted from the end; axes
        of stacked layers are added to a single one. `None`: what the leaf's uses say, its free and
        stacked axes; without uses the last axis and, of three axes and more, the first. Only without
        `group_size`.
      group_axis: the axis of groups, counted from the end. `None`: what the leaf's uses say, its
        innermost contracted axis; without uses -2 (of a vector -1).
      otherwise: what becomes of a leaf whose group axis the group size does not divide. `"pad"`: its last
        group is padded, which costs no bytes but those of its scale; `"channel"`: one scale per channel;
        `"dense"`: it stays as it is; `"error"`; `"auto"`: `"pad"` where the axis is longer than a group,
        else `"channel"`, and `"dense"` where scales would take more bytes than codes save.

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
    channel_axis: int | tuple[int, ...] | None = None
    group_axis: int | None = None
    otherwise: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype is None:
            _checks.choice("bits", self.bits, (8, 4, 2))
        else:
            name = _format_name(self.dtype)
            _checks.choice("dtype", name, FORMATS)
            if self.bits not in (8, _BITS[name]):
                raise ValueError(
                    f"bits, dtype: {self.bits} bits contradict {name!r}; give one of them"
                )
            # one form for each format, so that equal formats are equal specs
            object.__setattr__(self, "bits", _BITS[name])
            object.__setattr__(self, "dtype", None if name.startswith("int") else name)
        if self.group_size is not None:
            _checks.positive_int("group_size", self.group_size)
            if self.channel_axis is not None:
                raise ValueError(
                    "channel_axis, group_size: groups have scales of their own; give one"
                )
            if self.granularity == "tensor":
                raise ValueError("granularity, group_size: 'tensor' contradicts groups; give one")
        elif self.group_axis is not None or self.otherwise != "auto":
            name = "otherwise" if self.group_axis is None else "group_axis"
            raise ValueError(f"{name}: needs group_size")
        _checks.choice("otherwise", self.otherwise, OTHERWISE)
        if not isinstance(self.channel_axis, int | None):
            object.__setattr__(self, "channel_axis", tuple(sorted(self.channel_axis)))
        for axis in (*_axes(self.channel_axis), *_axes(self.group_axis)):
            if isinstance(axis, bool) or not isinstance(axis, int) or axis >= 0:
                raise ValueError(
                    "channel_axis, group_axis: expected axes counted from the end (-1 is the last), "
                    f"got {axis!r}"
                )
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

    @property
    def padded_axis(self) -> int | None:
        """The axis whose last group is padded, of a spec as a leaf has it; `None` where all are whole."""
        return self.group_axis if self.otherwise == "pad" else None


def _axes(given: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if given is None else given if isinstance(given, tuple) else (given,)


def _format_name(dtype: Any) -> str:
    if isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype)


class Fit(NamedTuple):
    """A spec as one leaf has it.

    Attributes:
      spec: with its axes; `None` where the leaf stays dense.
      instead: `"pad"`, `"channel"` or `"dense"` where groups do not divide it, else `""`.
    """

    spec: Spec | None
    instead: str = ""


def fitted(
    spec: Spec,
    path: str,
    shape: tuple[int, ...],
    uses: Uses | None = None,
    *,
    is_read: bool = False,
) -> Fit:
    """A spec with the axes that it has on a leaf, from the leaf's uses or by convention; `is_read` says
    that a program was read for them.

    Raises:
      ValueError: an axis that the leaf does not have, or groups that do not divide it where
        `otherwise="error"`; the message names the leaf, and what would do.
    """
    ndim = len(shape)
    known = uses or conventions([path], [shape])[0].uses
    # a spec that was resolved for a whole stack may name axes that one layer does not have
    is_given = uses is not None or isinstance(spec.channel_axis, int)
    for axis in (*(_axes(spec.channel_axis) if is_given else ()), *_axes(spec.group_axis)):
        if axis < -ndim:
            raise ValueError(
                f"channel_axis, group_axis: leaf {path!r} of shape {shape} has no axis {axis}; leave it "
                "out with where= or rules="
            )
    if spec.group_size is None:
        return Fit(_by_channel(spec, known, ndim))
    if not shape:
        raise ValueError(f"group_size: leaf {path!r} is a scalar and has no axis to group")
    axis = known.group_axis(ndim) if spec.group_axis is None else spec.group_axis
    has_no_axis = is_read and axis in known.stacked
    if has_no_axis and spec.group_axis is not None:
        raise ValueError(
            f"group_axis: {axis} stacks layers of leaf {path!r} of shape {shape}; they share no scale"
        )
    if not has_no_axis and shape[axis] % spec.group_size == 0:
        return Fit(replace(spec, group_axis=axis, otherwise="auto"))
    if spec.otherwise == "error":
        raise ValueError(_does_not_divide(spec.group_size, path, shape, axis))
    if spec.padded_axis == axis:  # fitted before
        return Fit(spec, "pad")
    return _instead(spec, shape, known, None if has_no_axis else axis)


def _by_channel(spec: Spec, known: Uses, ndim: int) -> Spec:
    stacked = tuple(axis for axis in known.stacked if axis >= -ndim)
    if spec.granularity == "tensor":
        return replace(spec, channel_axis=stacked)
    given = spec.channel_axis
    axes = given if isinstance(given, tuple) else (*stacked, *_axes(given))
    return replace(spec, channel_axis=known.channel_axes if given is None else tuple({*axes}))


def _instead(spec: Spec, shape: tuple[int, ...], known: Uses, axis: int | None) -> Fit:
    """What a leaf gets whose group axis is not whole groups, or that has none (`axis` is `None`)."""
    assert spec.group_size is not None
    plain = replace(spec, group_size=None, group_axis=None, otherwise="auto")
    channels = Fit(_by_channel(plain, known, len(shape)), "channel")
    padded = Fit(replace(spec, group_axis=axis, otherwise="pad"), "pad")
    if spec.otherwise == "dense":
        return Fit(None, "dense")
    if axis is None or spec.otherwise == "channel":
        found = channels
    elif spec.otherwise == "pad":
        found = padded
    else:
        found = padded if shape[axis] > spec.group_size else channels
    if spec.otherwise != "auto" or found.spec is None:
        return found
    size = math.prod(shape)
    if found is padded and axis is not None:
        scales = size // shape[axis] * -(-shape[axis] // spec.group_size)
    else:
        scales = math.prod(shape[i] for i in _axes(found.spec.channel_axis))
    saved = size * (16 - spec.width) // 8  # against the narrowest floats
    return found if 4 * scales < saved else Fit(None, "dense")


def _does_not_divide(wanted: int, path: str, shape: tuple[int, ...], axis: int) -> str:
    divisors = [d for d in range(1, shape[axis] + 1) if shape[axis] % d == 0]
    near = min(divisors, key=lambda d: abs(d - wanted), default=1)
    return (
        f"group_size: {wanted} does not divide axis {axis} of leaf {path!r} with shape {shape}; use "
        f"{near}, None, another group_axis, otherwise='pad', 'channel' or 'dense', or leave the leaf "
        "out with where= or rules="
    )


def group_length(n: int, count: int, spec: Spec | None, axis: int) -> int:
    """Entries of one scale along an axis of `n` entries and `count` scales, counted from the end."""
    if spec is not None and spec.padded_axis == axis and count > 1:
        assert spec.group_size is not None
        return spec.group_size
    return n // max(count, 1)


def reduced_axes(spec: Spec, ndim: int) -> tuple[int, ...]:
    """The axes that share a scale, counted from the end, of a resolved spec without groups."""
    return tuple(axis for axis in range(-ndim, 0) if axis not in _axes(spec.channel_axis))


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
