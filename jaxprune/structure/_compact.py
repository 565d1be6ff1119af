"""Masked units removed for good: a smaller function and smaller parameters."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree
from jaxprune.graph import Graph, Reduced, reduced, removal_of, trace
from jaxprune.graph import evaluate as run
from jaxprune.program import Inputs, inputs_of
from jaxprune.structure._fold import FOLDS, folded


class SmallFunction:
    """A function at smaller sizes, from `jp.compact`.

    Called like the original, with the small parameters. It is traced anew, and coupled anew, for each
    shape of inputs.

    Attributes:
      differences: with `verify=True`, per output the largest absolute difference on the example inputs;
        else `None`.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        full: Params,
        updates: Callable[[Any], Any] | None,
        start: Reduced,
        blank: tuple[int, ...],
    ) -> None:
        """Made by `jp.compact`."""
        self._fn, self._full, self._updates, self._blank = fn, full, updates, blank
        self.differences: dict[str, float] | None = None
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__wrapped__ = fn
        # what every plan must remove, whatever the inputs
        program = start.plan.program
        self._removed = [
            [~np.isin(np.arange(n), index) for n, index in zip(np.shape(leaf), left, strict=True)]
            for leaf, left in zip(
                _trees.flatten(full)[1],
                [start.plan.kept[i] for i in program.inputs],
                strict=False,
            )
        ]
        self._small = [_sizes(left) for left in start.kept]
        self._plans: dict[Any, tuple[Graph, Reduced]] = {}

    def of(self, fn: Callable[..., Any]) -> "SmallFunction":
        """Another function of the same parameters, such as the network in train mode, at these sizes."""
        other = copy.copy(self)
        other._fn, other._plans, other.differences = fn, {}, None
        return other

    def remember(self, args: Any, kwargs: Any, graph: Graph, found: Reduced) -> None:
        """Keeps a plan for these inputs."""
        self._plans[inputs_of(args, kwargs).key] = graph, found

    def _plan(self, args: Any, kwargs: Any) -> tuple[Graph, Reduced]:
        key = inputs_of(args, kwargs).key
        if key not in self._plans:
            graph = trace(self._fn, self._full, *args, updates=self._updates, **kwargs)
            removal = removal_of(graph.units, graph.own, self._removed, list(self._blank))
            self.remember(args, kwargs, graph, reduced(graph, removal))
        return self._plans[key]

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        graph, found = self._plan(args, kwargs)
        paths, leaves, _ = _trees.flatten(params)
        for path, leaf, shape in zip(paths, leaves, self._small, strict=True):
            if np.shape(leaf) != shape:
                raise ValueError(
                    f"params: leaf {path!r} has shape {np.shape(leaf)}, expected {shape}: this function "
                    "takes the small parameters that jp.compact returned with it"
                )
        wanted = [_sizes(found.plan.kept[i]) for i in found.plan.program.inputs]
        inputs = [
            x if np.shape(x) == shape else jnp.zeros(shape, x.dtype)
            for x, shape in zip(leaves, wanted, strict=False)
        ]
        outs = run(found.plan, [*inputs, *inputs_of(args, kwargs).arrays])
        for position, leaf in graph.updated.items():  # what is gone stays gone
            if np.shape(outs[position]) != self._small[leaf]:
                outs[position] = jnp.zeros(self._small[leaf], outs[position].dtype)
        return found.plan.program.out_tree.unflatten(outs)


def compact(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *args: Any,
    updates: Callable[[Any], Any] | None = None,
    fold: str | None = None,
    verify: bool = False,
    **kwargs: Any,
) -> tuple[SmallFunction, Params]:
    """Removes every unit all of whose slices are masked, and every layer that is.

    `small_fn(small_params, *args)` equals `fn(apply_masks(params, masks), *args)` up to rounding, for
    any batch size. Entries that are masked without their unit are set to zero and stay. Leaves that are
    masked throughout count as zero for good; what only they feed is not computed, and where a whole layer
    went with them, they are left without entries.

    Args:
      fn: `fn(params, *args)`, any traceable function.
      params: its parameters.
      masks: tree of bools with the structure of `params`.
      *args: example inputs.
      updates: the part of the output that is an updated copy of parameters, see `jp.trace`.
      fold: what to keep of units that go, moved into the biases (or BatchNorm means) behind them. `None`:
        nothing. `"constants"`: what a unit contributes when nothing reaches it any more but its own
        bias, BatchNorm shift or an activation that is not zero at zero. `"mean"`: what it contributes on
        average over the example inputs, where places with large sums count less. Both move sums
        exactly, up to the borders of padded convolutions.
      verify: compare both functions on the example inputs and refuse where they differ; the differences
        are `small_fn.differences`.
      **kwargs: further example inputs.

    Returns:
      `(small_fn, small_params)`; both jit, differentiate and map like the originals.

    Raises:
      ValueError: masks of another tree; masks that leave no path from the inputs to an output; an `fn`
        that cannot be traced; with `verify`, results that differ.
      TypeError: inputs that `fn` needs are missing.

    Example:
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> keep = jnp.arange(8) < 6
      >>> masks = {"a": keep[None], "b": keep[:, None]}
      >>> small_fn, small = jp.compact(fn, params, masks, jnp.ones((1, 4)), verify=True)
      >>> small["a"].shape, small["b"].shape, small_fn.differences
      ((4, 6), (6, 2), {'output': 0.0})
    """
    _checks.masks_fit(masks, params)
    _checks.choice("fold", fold, (None, *FOLDS))
    _checks.all_dense("params", params, "compact before quantizing, clustering or tying")
    graph = trace(fn, params, *args, updates=updates, **kwargs)
    removal = graph.removal(masks)
    found = reduced(graph, removal)
    _check_reached(graph, found, masks)
    leaves = graph.treedef.flatten_up_to(params)
    flags = graph.treedef.flatten_up_to(masks)
    given = inputs_of(args, kwargs)
    reference = None
    if fold is not None:
        leaves, reference = folded(graph, removal, leaves, flags, given.arrays, fold)
    small = [_cut(*item) for item in zip(leaves, flags, found.kept, strict=True)]
    full = graph.treedef.unflatten(
        jax.ShapeDtypeStruct(shape, leaf.dtype)
        for shape, leaf in zip(graph.shapes, leaves, strict=True)
    )
    small_fn = SmallFunction(fn, full, updates, found, removal.blank)
    small_fn.remember(args, kwargs, graph, found)
    small_params = graph.treedef.unflatten(small)
    if verify:
        if reference is None:
            masked = [_masked(leaf, flag) for leaf, flag in zip(leaves, flags, strict=True)]
            reference = _jitted(fn, given)(graph.treedef.unflatten(masked))
        else:
            reference = graph.program.out_tree.unflatten(reference)
        result = _jitted(small_fn, given)(small_params)
        small_fn.differences = _differences(graph, reference, result)
    return small_fn, small_params


def _jitted(fn: Callable[..., Any], inputs: Inputs) -> Callable[[Params], Any]:
    def call(params: Params, arrays: list[Any]) -> Any:
        args, kwargs = inputs.rebuild(arrays)
        return fn(params, *args, **kwargs)

    return lambda params: jax.jit(call)(params, inputs.arrays)


def _sizes(left: tuple[np.ndarray, ...]) -> tuple[int, ...]:
    return tuple(len(index) for index in left)


def _check_reached(graph: Graph, found: Reduced, masks: Masks) -> None:
    """Refuses masks that leave no path from the inputs to an output that had one."""
    lost = [position for position in found.cut_off if position not in graph.updated]
    if not lost:
        return
    flags = graph.treedef.flatten_up_to(masks)
    blank = [p for p, flag in zip(graph.paths, flags, strict=True) if not np.any(np.asarray(flag))]
    raise ValueError(
        f"masks: nothing of the inputs reaches output {lost[0]} any more; nothing is left of "
        f"{', '.join(blank[:4])}{', …' if len(blank) > 4 else ''}; keep at least one unit of each layer "
        "that has no other path around it"
    )


def _cut(param: Any, mask: Any, left: tuple[np.ndarray, ...]) -> Any:
    """What is left of a leaf, its masked entries zero.

    On the host: eager JAX would compile each of a hundred shapes.
    """
    keep = np.asarray(mask)
    whole = all(len(index) == n for index, n in zip(left, np.shape(param), strict=True))
    if whole and keep.all():
        return param
    x = np.asarray(param)
    keep = keep.reshape((1,) * (x.ndim - keep.ndim) + keep.shape)
    for axis, index in enumerate(left):
        if len(index) < x.shape[axis]:
            x = np.take(x, index, axis=axis)
            if keep.shape[axis] > 1:
                keep = np.take(keep, index, axis=axis)
    if not keep.all():
        x = np.where(keep, x, np.zeros((), x.dtype))
    return jnp.asarray(x)


def _masked(leaf: Any, flag: Any) -> Any:
    return leaf if np.asarray(flag).all() else jnp.where(flag, leaf, jnp.zeros((), leaf.dtype))


def _differences(graph: Graph, reference: PyTree, result: PyTree) -> dict[str, float]:
    """Per output the largest difference; outputs that shrink with the parameters are left out.

    Raises:
      ValueError: a difference beyond rounding.
    """
    found = {}
    tolerance = 1e-3 if _precise(graph) else 0.1
    paths, expected, _ = _trees.flatten(reference)
    for position, (path, a, b) in enumerate(
        zip(paths, expected, jax.tree.leaves(result), strict=True)
    ):
        if position in graph.updated:
            continue
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        difference = float(np.max(np.abs(a - b), initial=0.0))
        found[path or "output"] = difference
        allowed = tolerance * max(float(np.max(np.abs(a), initial=0.0)), 1e-3)
        if not difference <= allowed:
            raise ValueError(
                f"verify: output {path!r} of the small function differs by {difference:.3g} from the "
                f"masked one, more than {allowed:.3g}; please report this with the function"
            )
    return found


def _precise(graph: Graph) -> bool:
    """No value of the function has fewer than 32 bits to round to."""
    dtypes = {
        aval.dtype for aval in graph.program.avals if jnp.issubdtype(aval.dtype, jnp.floating)
    }
    return all(jnp.finfo(dtype).bits >= 32 for dtype in dtypes)
