"""Statistics of what multiplies a weight, as sums that add up over batches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune._uses import Uses

_PER_OCTAVE, _OCTAVES, _LOWEST = 32, 44, -28.0  # bins of magnitudes, from 2^-28 to 2^16
_SAMPLE = 2**18

_SUM = ("count", "total", "squares", "histogram", "products")
_MOST = ("absmax", "high")
_LEAST = ("low",)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "count", "mean", "mean_square", "absmax", "low", "high", "moving_low", "moving_high",
        "histogram", "second_moment",
    ),
    meta_fields=("axes", "uses", "groups"),
)  # fmt: skip
@dataclass(frozen=True, repr=False)
class Stats:
    """What multiplied a weight during calibration.

    Features are the indices that a product sums over, as the weight lays them out: the inputs of a dense
    kernel; height, width and input channels of a convolution's (im2col). Stacks of layers that a `scan`
    maps over have a leading axis everywhere, as have batched products (experts) in features.

    Attributes:
      count: rows seen, or the sum of their weights; of batched products (experts) one each, of rows
        that are not all zero, as unused slots are. 0 for a leaf that multiplies nothing, whose other
        fields are empty.
      mean, mean_square, absmax: (features,).
      low, high: least and largest entry.
      moving_low, moving_high: moving averages of each batch's.
      histogram: (2, bins) counts of negative and other entries by magnitude, or `None`.
      second_moment: (features, features), the mean of x xᵀ, or `None`.
      axes: the weight's summed axes, counted from the end, ascending.
      uses: what the calibrated function does with the leaf, see `jp.uses`.
      groups: of a grouped convolution: the axis before features counts them, since each group of output
        channels reads features of its own (depthwise ones have as many groups as channels).
    """

    count: Array
    mean: Float[Array, "*lead features"]
    mean_square: Float[Array, "*lead features"]
    absmax: Float[Array, "*lead features"]
    low: Array
    high: Array
    moving_low: Array
    moving_high: Array
    histogram: Array | None
    second_moment: Array | None
    axes: tuple[int, ...]
    uses: Uses
    groups: int = 1

    def __repr__(self) -> str:
        if not jnp.size(self.mean):
            return "Stats(of a leaf that multiplies nothing)"
        names = ("histogram", "second_moment")
        more = "".join(f", {name}" for name in names if getattr(self, name) is not None)
        return f"Stats(features {jnp.shape(self.mean)}{more}, axes {self.axes})"


def empty(uses: Uses) -> Stats:
    """Of a leaf that multiplies nothing."""
    none, zero = jnp.zeros((0,)), jnp.zeros(())
    return Stats(zero, none, none, none, zero, zero, zero, zero, None, None, (), uses)


def sums(
    x: Float[Array, "*lead rows features"],
    weights: Float[Array, "*lead rows"] | None = None,
    *,
    histogram: bool,
    second_moment: bool,
) -> dict[str, Array]:
    """What `merged` adds up and `finished` turns into `Stats`; rows of weight 0 are not looked at."""
    x = x.astype(jnp.float32)
    if weights is None:
        weights = jnp.ones(x.shape[-2], jnp.float32)
    counts = (weights > 0)[..., None]
    x = jnp.where(counts, x, 0.0)
    weighted = x * weights[..., None]
    found = {
        "count": jnp.sum(weights, -1),
        "total": jnp.sum(weighted, -2),
        "squares": jnp.sum(x * weighted, -2),
        "absmax": jnp.max(jnp.abs(x), -2, initial=0.0),
        "low": jnp.min(x, initial=jnp.inf, where=counts),
        "high": jnp.max(x, initial=-jnp.inf, where=counts),
    }
    if histogram:
        found["histogram"] = _histogram(
            x.reshape(-1), jnp.broadcast_to(weights[..., None], x.shape).reshape(-1)
        )
    if second_moment:
        found["products"] = jnp.einsum("...rf,...rg->...fg", x, weighted)
    return found


def _histogram(x: Float[Array, "n"], weights: Float[Array, "n"]) -> Float[Array, "2 bins"]:
    step = max(-(-x.size // _SAMPLE), 1)
    x, weights = x[::step], weights[::step]
    size = jnp.maximum(jnp.abs(x), 2.0**_LOWEST)
    place = jnp.floor((jnp.log2(size) - _LOWEST) * _PER_OCTAVE).astype(jnp.int32)
    place = jnp.clip(place, 0, _PER_OCTAVE * _OCTAVES - 1)
    bins = jnp.zeros((2, _PER_OCTAVE * _OCTAVES))
    return bins.at[(x >= 0).astype(jnp.int32), place].add(weights)


def magnitudes() -> np.ndarray:
    """The upper edge of each bin of a histogram."""
    return 2.0 ** (_LOWEST + (np.arange(_PER_OCTAVE * _OCTAVES) + 1) / _PER_OCTAVE)


def nothing(shapes: dict[str, Any]) -> dict[str, Array]:
    """The sums over no rows, which change none that they are merged with."""
    fill = {"low": jnp.inf, "high": -jnp.inf}
    return {key: jnp.full(x.shape, fill.get(key, 0.0), x.dtype) for key, x in shapes.items()}


def averaged(before: tuple[Any, Any], ends: tuple[Any, Any], decay: float) -> tuple[Any, Any]:
    """Moving averages of the ends of a range; a batch that saw nothing changes none."""

    def average(a: Any, b: Any) -> Any:
        return jnp.where(jnp.isinf(b), a, jnp.where(jnp.isinf(a), b, decay * a + (1 - decay) * b))

    return average(before[0], ends[0]), average(before[1], ends[1])


def merged(path: str, records: list[dict[str, Array]], stacked: bool) -> dict[str, Array]:
    """Sums of several parts together; `stacked`: of one record along its leading axis."""

    def join(key: str, op: Callable[..., Array]) -> Array:
        if stacked:
            return op(records[0][key], axis=0)
        return op(jnp.stack([record[key] for record in records]), axis=0)

    ops = {**dict.fromkeys(_SUM, jnp.sum), **dict.fromkeys(_MOST, jnp.max)}
    ops |= dict.fromkeys(_LEAST, jnp.min)
    return {key: join(key, ops[key]) for key in records[0]}


def finished(
    record: dict[str, Any],
    moving: tuple[Any, Any],
    axes: tuple[int, ...],
    uses: Uses,
    groups: int,
) -> Stats:
    """Means of the sums."""
    count = record["count"]
    rows = lambda x: (
        x
        / jnp.maximum(count, 1.0).reshape(jnp.shape(count) + (1,) * (jnp.ndim(x) - jnp.ndim(count)))
    )
    products = record.get("products")
    seen = lambda end: jnp.where(jnp.isinf(end), 0.0, end)
    return Stats(
        count,
        rows(record["total"]),
        rows(record["squares"]),
        record["absmax"],
        *(seen(end) for end in (record["low"], record["high"], *moving)),
        record.get("histogram"),
        None if products is None else rows(products),
        axes,
        uses,
        groups,
    )
