"""Running a function on data, and noting what reaches its weights."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxprune import _trees
from jaxprune._types import Params, PyTree, Where
from jaxprune.calibration._stats import Stats, empty, finished, merged, sums
from jaxprune.program import (
    Follower,
    Found,
    Held,
    Use,
    inputs_of,
    layout_of,
    standard,
    trace_program,
)


def calibrate(
    fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    second_moment: bool = False,
    histogram: bool = False,
    decay: float = 0.99,
    where: Where = None,
) -> PyTree:
    """Runs a function on data and records what multiplies each weight.

    Any function: products and convolutions with a leaf of `params`, through transposes, reshapes, scans
    over layers (then every field has a leading axis) and recurrences. A weight used several times sees
    everything that multiplies it. What `while` and `cond` do is not recorded.

    Args:
      fn: `fn(params, *inputs)`.
      params: any tree of arrays; compressed leaves count as what they stand for.
      batches: tuples, each what follows `params` in `fn`; a lone array counts as a one-tuple. Batches of
        equal shapes share one compilation.
      second_moment: also the mean of x xᵀ, (features, features) per weight.
      histogram: also a histogram of magnitudes, which percentiles and the smallest error need.
      decay: of the moving averages of each batch's range, in [0, 1).
      where: which leaves are recorded; by default floating leaves with two axes or more.

    Returns:
      The tree of `params` with a `Stats` for each leaf.

    Raises:
      ValueError: no batches; a NaN or an infinity reaches a weight (named, with the batch).

    Example:
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> stats = jp.calibrate(fn, params, [jnp.ones((4, 3)), 2 * jnp.ones((4, 3))])
      >>> stats["w"].count.item(), stats["w"].mean.tolist(), stats["b"].count.item()
      (8.0, [1.5, 1.5, 1.5], 0.0)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
    params = _trees.resolve_ties(params)
    paths, leaves, treedef = _trees.flatten(params)
    wanted = {p for p, hit in zip(paths, _trees.select(params, where), strict=True) if hit}
    axes: dict[str, tuple[int, ...]] = {}
    step = _step(fn, treedef, paths, wanted, axes, histogram=histogram, second_moment=second_moment)
    total: dict[str, Any] = {}
    moving: dict[str, tuple[Any, Any]] = {}
    jitted: dict[Any, Any] = {}
    for number, batch in enumerate(
        track(batches, "calibrate", transient=True, disable=not Console().is_terminal)
    ):
        args = batch if isinstance(batch, tuple) else (batch,)
        inputs = inputs_of(args, {})
        if inputs.key not in jitted:
            jitted[inputs.key] = jax.jit(step(args))
        record = jitted[inputs.key](leaves, inputs.arrays)
        _refuse_non_finite(record, number)
        for path, found in record.items():
            ends = (found["low"], found["high"])
            before = moving.get(path, ends)
            moving[path] = tuple(
                decay * a + (1 - decay) * b for a, b in zip(before, ends, strict=True)
            )
            total[path] = merged([total[path], found], False) if path in total else found
    if not jitted:
        raise ValueError("batches: expected at least one, got none (an exhausted iterator?)")
    return treedef.unflatten(
        finished(total[path], moving[path], axes[path]) if path in total else empty()
        for path in paths
    )


def ranges_seen(
    fn: Callable[..., Any], params: Params, paths: list[str], *args: Any, **kwargs: Any
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The least and largest entry that multiplies each of some leaves, on one batch; traceable."""
    names, leaves, treedef = _trees.flatten(_trees.resolve_ties(params))
    inputs = inputs_of(args, kwargs)
    bound = lambda p, *arrays: _rebuilt(fn, inputs, p, list(arrays))
    step = _step(bound, treedef, names, set(paths), {}, histogram=False, second_moment=False)
    record = step(tuple(inputs.arrays))(leaves, inputs.arrays)
    return {path: (found["low"], found["high"]) for path, found in record.items()}


def _rebuilt(fn: Callable[..., Any], inputs: Any, params: Any, arrays: list[Any]) -> Any:
    args, kwargs = inputs.rebuild(arrays)
    return fn(params, *args, **kwargs)


def _step(
    fn: Callable[..., Any],
    treedef: Any,
    paths: list[str],
    wanted: set[str],
    axes: dict[str, tuple[int, ...]],
    *,
    histogram: bool,
    second_moment: bool,
) -> Callable[[tuple[Any, ...]], Callable[..., dict[str, Any]]]:
    def use(seen: Use) -> Found:
        found = operand_of(seen)
        if found is None:
            return Found()
        path, x, summed = found
        if axes.setdefault(path, summed) != summed:
            return Found()  # used the other way round, as tied embeddings are: its first use counts
        return Found(record={path: sums(x, histogram=histogram, second_moment=second_moment)})

    def for_inputs(args: tuple[Any, ...]) -> Callable[..., dict[str, Any]]:
        def run(leaves: list[Any], arrays: list[Any]) -> dict[str, Any]:
            dense = [_trees.dense(leaf) for leaf in leaves]
            program = trace_program(fn, treedef.unflatten(dense), *args)
            held = [
                Held.of(x, path) if path in wanted else x
                for path, x in zip(paths, dense, strict=True)
            ]
            return Follower(use, merge=merged).run(program, [*held, *arrays])[1]

        return run

    return for_inputs


def operand_of(use: Use) -> tuple[str, jax.Array, tuple[int, ...]] | None:
    """What multiplies a followed weight in a product or convolution: its path, the rows and features
    (…, rows, features), features in the order of the weight's axes, and these axes.
    """
    operation, operands = use
    if operation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return None
    sides = [i for i in (0, 1) if isinstance(operands[i], Held)]
    if len(sides) != 1:
        return None
    side = sides[0]
    held, x = operands[side], operands[1 - side]
    if operation.primitive.name == "dot_general":
        layout = layout_of(operation, held, x, side)
        rows = standard(operation, x, side, layout)  # (batch…, rows, contracted…)
        first = rows.ndim - len(layout.contract)
        order = np.argsort(layout.contract)
        rows = jnp.transpose(rows, (*range(first), *(first + i for i in order)))
        rank = len(layout.shape)
        axes = tuple(layout.contract[i] - rank for i in order)
        return held.path, rows.reshape(*rows.shape[:first], -1), axes
    return None if side == 0 else (held.path, *_patches(operation, held, x))


def _patches(operation: Any, held: Held, x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    params = operation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    window = [held.shape[i] for i in numbers.rhs_spec[2:]]
    patches = jax.lax.conv_general_dilated_patches(
        jnp.transpose(x, numbers.lhs_spec),  # (batch, channels, space…)
        window,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
    )  # (batch, channels × window, space…)
    channels = held.shape[numbers.rhs_spec[1]]
    n = patches.shape[0]
    patches = patches.reshape(n, groups, channels, *window, -1)
    # as the kernel lays out its inputs: per read axis (input channels and window) its place
    read = {numbers.rhs_spec[1]: 2, **{a: 3 + i for i, a in enumerate(numbers.rhs_spec[2:])}}
    rank = len(held.order)
    stored = sorted((held.order[axis], place) for axis, place in read.items())
    last = patches.ndim - 1
    patches = jnp.transpose(patches, (0, 1, last, *(place for _, place in stored)))
    assert rank == len(read) + 1
    features = int(np.prod([channels, *window]))
    return patches.reshape(-1, features), tuple(axis for axis, _ in stored)


def _refuse_non_finite(record: dict[str, Any], batch: int) -> None:
    ends = jax.device_get({p: (r["low"], r["high"]) for p, r in record.items()})
    for path, pair in ends.items():
        if not all(np.isfinite(end).all() for end in pair):
            raise ValueError(
                f"batches: in batch {batch}, NaN or infinity multiplies leaf {path!r}; look at the data "
                "and at the layers before it"
            )


def stats_leaves(stats: PyTree, paths: list[str]) -> list[Stats]:
    """The `Stats` of each leaf of a tree with these paths.

    Raises:
      ValueError: the statistics are of another tree.
    """
    items, _ = jax.tree_util.tree_flatten_with_path(stats, is_leaf=lambda x: isinstance(x, Stats))
    found = [_trees.path_str(path) for path, _ in items]
    if found != paths or not all(isinstance(leaf, Stats) for _, leaf in items):
        odd = sorted(set(found) ^ set(paths))[:3]
        raise ValueError(
            f"stats: of another tree ({odd} differ); give what calibrate(fn, params, batches) returned "
            "for these params"
        )
    return [leaf for _, leaf in items]
