"""Running a function on data, and noting what reaches its weights."""

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._progress import track
from jaxprune._types import Params, PyTree, Where
from jaxprune._uses import Uses
from jaxprune.calibration._rows import check_weights, row_weights, rows_that_count
from jaxprune.calibration._stats import Stats, averaged, empty, finished, merged, nothing, sums
from jaxprune.program import (
    Executor,
    HookResult,
    Operation,
    Step,
    TraceCache,
    Tracked,
    inputs_of,
    is_product,
    layout_of,
    standard,
    trace_program,
    uses_of_program,
)


def calibrate(
    fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    second_moment: bool = False,
    histogram: bool = False,
    decay: float = 0.99,
    weights: str | Callable[..., Any] | None = "auto",
    where: Where = None,
) -> PyTree:
    """Runs a function on data and records what multiplies each weight.

    Any function: products and convolutions with a leaf of `params`, through transposes, reshapes, scans
    over layers (then every field has a leading axis), recurrences, loops and branches. A weight used
    several times sees everything that multiplies it.

    Args:
      fn: `fn(params, *inputs)`.
      params: any tree of arrays; compressed leaves count as what they stand for.
      batches: tuples, each what follows `params` in `fn`; a lone array counts as a one-tuple. Batches of
        equal shapes share one compilation.
      second_moment: also the mean of x xᵀ, (features, features) per weight.
      histogram: also a histogram of magnitudes, which percentiles and the smallest error need.
      decay: of the moving averages of each batch's range, in [0, 1).
      weights: which rows count, so that padding does not: `(*batch) -> array` of numbers >= 0, with the
        shape of the leading axes of what multiplies weights, such as (batch, tokens); or the name of an
        argument of `fn` that holds them; `None`: all rows. By default (`"auto"`) an argument named
        `mask`, `attention_mask` or `padding_mask` where it has such a shape, and a warning says so.
      where: which leaves are recorded; by default the weights of the traced function.

    Returns:
      The tree of `params` with a `Stats` for each leaf; it carries what the function uses each for, so
      that it serves as `uses=` too.

    Raises:
      ValueError: no batches; a NaN or an infinity reaches a weight (named, with the batch).
      TypeError: a static argument that is not hashable.

    Warns:
      UserWarning: a weight where what multiplies it cannot be recorded, such as one split over devices;
        a mask among the arguments that was taken for weights of rows; weights of rows that fit no axes of
        what multiplies a leaf, all of whose rows count then.

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
    if where is not None:
        _trees.select(params, where)  # a bad `where` fails before any work
    counting = rows_that_count(fn, weights)
    known: dict[str, Uses] = {}
    axes: dict[str, tuple[tuple[int, ...], int]] = {}
    recorded = {"histogram": histogram, "second_moment": second_moment}
    step = _step(fn, treedef, paths, where, axes, known, **recorded)
    total: dict[str, Any] = {}
    moving: dict[str, tuple[Any, Any]] = {}
    jitted = TraceCache()
    for number, batch in enumerate(track(batches, "calibrate")):
        args = batch if isinstance(batch, tuple) else (batch,)
        inputs = inputs_of(args, {})
        rows = counting(args)
        check_weights(rows, number)
        run = jitted.get(inputs.key, lambda args=args: jax.jit(step(args)))
        record = run(leaves, inputs.arrays, rows)
        _refuse_non_finite(record, number)
        for path, found in record.items():
            ends = (found["low"], found["high"])
            moving[path] = averaged(moving.get(path, ends), ends, decay)
            total[path] = merged(path, [total[path], found], False) if path in total else found
    if not len(jitted):
        raise ValueError("batches: expected at least one, got none (an exhausted iterator?)")
    return treedef.unflatten(
        finished(total[path], moving[path], axes[path][0], known[path], axes[path][1])
        if path in total
        else empty(known[path])
        for path in paths
    )


def ranges_seen(
    fn: Callable[..., Any], params: Params, paths: list[str], *args: Any, **kwargs: Any
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The least and largest entry that multiplies each of some leaves, on one batch; traceable."""
    names, leaves, treedef = _trees.flatten(_trees.resolve_ties(params))
    inputs = inputs_of(args, kwargs)
    bound = lambda p, *arrays: _rebuilt(fn, inputs, p, list(arrays))
    chosen = [re.escape(path) for path in paths]
    recorded = {"histogram": False, "second_moment": False}
    step = _step(bound, treedef, names, chosen, {}, {}, **recorded)
    record = step(tuple(inputs.arrays))(leaves, inputs.arrays, None)
    return {path: (found["low"], found["high"]) for path, found in record.items()}


def _rebuilt(fn: Callable[..., Any], inputs: Any, params: Any, arrays: list[Any]) -> Any:
    args, kwargs = inputs.rebuild(arrays)
    return fn(params, *args, **kwargs)


def _step(
    fn: Callable[..., Any],
    treedef: Any,
    paths: list[str],
    where: Where,
    axes: dict[str, tuple[tuple[int, ...], int]],
    known: dict[str, Uses],
    **recorded: bool,
) -> Callable[[tuple[Any, ...]], Callable[..., dict[str, Any]]]:
    """One batch as a function to jit; `axes` and `known` are filled while it is traced."""

    def for_inputs(args: tuple[Any, ...]) -> Callable[..., dict[str, Any]]:
        def run(leaves: list[Any], arrays: list[Any], weights: Any) -> dict[str, Any]:
            dense = [_trees.dense(leaf) for leaf in leaves]
            params = treedef.unflatten(dense)
            program = trace_program(fn, params, *args)
            found = uses_of_program(program, len(dense))
            known.update(zip(paths, found, strict=True))
            chosen = _trees.select(params, where, uses=treedef.unflatten(found))
            tracked = [
                Tracked.of(x, path) if hit else x
                for path, x, hit in zip(paths, dense, chosen, strict=True)
            ]

            def use(step: Step) -> HookResult:
                operand = operand_of(step)
                if operand is None:
                    return HookResult()
                found = operand.axes, operand.groups
                # used the other way round, as tied embeddings are: its first use counts
                if axes.setdefault(operand.path, found) != found:
                    return HookResult()
                own = row_weights(weights, operand.x, operand.sizes, operand.groups, operand.path)
                return HookResult(record={operand.path: sums(operand.x, own, **recorded)})

            executor = Executor(
                use, enters=lambda operation: True, dense=_told, merge=merged, neutral=nothing
            )
            return executor.run(program, [*tracked, *arrays])[1]

        return run

    return for_inputs


def _told(operation: Operation | None, tracked: Tracked, reason: str) -> None:
    """Says what is not recorded: weights that an operation with programs of its own takes whole."""
    if operation is not None and operation.inner:
        warnings.warn(
            f"calibrate: what multiplies {tracked.path!r} inside of {operation.name} at "
            f"{operation.source} is not recorded: {reason}",
            stacklevel=2,
        )


class Operand(NamedTuple):
    """What multiplies a tracked weight in a product or convolution.

    Attributes:
      path: of the weight.
      x: (…, rows, features), features in the order of the weight's axes.
      axes: these axes, counted from the end.
      sizes: of the axes that make the rows.
      groups: of a convolution: if above 1, the axis of `x` before rows.
    """

    path: str
    x: jax.Array
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    groups: int = 1


def operand_of(step: Step) -> Operand | None:
    """What multiplies a tracked weight, if the step is a product or convolution with one."""
    operation, operands, _ = step
    if not is_product(operation.name) or "dimension_numbers" not in operation.params:
        return None
    sides = [i for i in (0, 1) if isinstance(operands[i], Tracked)]
    if len(sides) != 1:
        return None
    side = sides[0]
    tracked, x = operands[side], operands[1 - side]
    if operation.name == "dot_general":
        layout = layout_of(operation, tracked, x, side)
        rows = standard(operation, x, side, layout)  # (batch…, rows, contracted…)
        first = rows.ndim - len(layout.contract)
        order = np.argsort(layout.contract)
        rows = jnp.transpose(rows, (*range(first), *(first + i for i in order)))
        rank = len(layout.shape)
        axes = tuple(layout.contract[i] - rank for i in order)
        return Operand(tracked.path, rows.reshape(*rows.shape[:first], -1), axes, layout.sizes)
    return None if side == 0 else _patches(operation, tracked, x)


def _patches(operation: Any, tracked: Tracked, x: jax.Array) -> Operand:
    """The windows that a kernel multiplies, as rows (im2col)."""
    params = operation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    window = [tracked.shape[i] for i in numbers.rhs_spec[2:]]
    patches = jax.lax.conv_general_dilated_patches(
        jnp.transpose(x, numbers.lhs_spec),  # (batch, channels, space…)
        window,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
    )  # (batch, channels × window, space…)
    channels = tracked.shape[numbers.rhs_spec[1]]
    n, space = patches.shape[0], patches.shape[2:]
    patches = patches.reshape(n, groups, channels, *window, -1)
    # as the kernel lays out its inputs: per read axis (input channels and window) its place
    read = {numbers.rhs_spec[1]: 2, **{a: 3 + i for i, a in enumerate(numbers.rhs_spec[2:])}}
    rank = len(tracked.order)
    stored = sorted((tracked.order[axis], place) for axis, place in read.items())
    last = patches.ndim - 1
    patches = jnp.transpose(patches, (1, 0, last, *(place for _, place in stored)))
    assert rank == len(read) + 1
    features = int(np.prod([channels, *window]))
    rows = patches.reshape(*(() if groups == 1 else (groups,)), -1, features)
    return Operand(tracked.path, rows, tuple(axis for axis, _ in stored), (n, *space), groups)


def _refuse_non_finite(record: dict[str, Any], batch: int) -> None:
    ends = jax.device_get({p: (r["low"], r["high"]) for p, r in record.items()})
    for path, (low, high) in ends.items():
        if not (np.isfinite(low) | (low == np.inf)).all() or not (high < np.inf).all():
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
