"""Masked units removed for good: a smaller function and smaller parameters."""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree
from jaxprune.graph import Graph, Kept, Reduced, Removal, reduced, removal_of, trace
from jaxprune.graph import evaluate as run
from jaxprune.program import Inputs, TraceCache, inputs_of
from jaxprune.structure._fold import FOLDS, folded
from jaxprune.structure._shrink import cut, stuck_slices


class CompactFunction:
    """A function at smaller sizes, from `jp.compact`.

    Called like the original, with the small parameters. It is traced anew, and coupled anew, for each
    shape of inputs; where a unit that was removed cannot be removed then, it is zero, as in the masked
    function, and a warning says why. It can be pickled where its function can, and `jp.export.save` takes
    it beside its parameters: files hold sizes, no code, so that `of` names the function after loading.

    Attributes:
      differences: with `verify=True`, per output the largest absolute difference on the example inputs;
        else `None`.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None,
        full: Params,
        kept: list[Kept],
        fully_masked: tuple[int, ...],
        updates: Callable[[Any], Any] | None,
    ) -> None:
        """Made by `jp.compact`; without `fn`, by `from_sizes`."""
        self._fn, self._full, self._updates = fn, full, updates
        self._kept, self._fully_masked = kept, fully_masked
        self.differences: dict[str, float] | None = None
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__wrapped__ = fn
        self._plans = TraceCache()

    def of(
        self, fn: Callable[..., Any], *, updates: Callable[[Any], Any] | None = None
    ) -> "CompactFunction":
        """Another function of the same parameters, such as the network in train mode, at these sizes.

        Args:
          fn: the function.
          updates: the part of its output that is an updated copy of parameters, see `jp.trace`.
        """
        return CompactFunction(fn, self._full, self._kept, self._fully_masked, updates)

    def sizes(self) -> dict[str, Any]:
        """What was removed, as a tree that goes to files. Inverse of `from_sizes`."""
        shapes = [leaf.shape for leaf in jax.tree.leaves(self._full)]
        kept = [
            [None if len(i) == n else np.asarray(i, np.int32) for n, i in zip(*pair, strict=True)]
            for pair in zip(shapes, self._kept, strict=True)
        ]
        return {"full": self._full, "kept": kept, "fully_masked": list(self._fully_masked)}

    @classmethod
    def from_sizes(cls, sizes: dict[str, Any]) -> "CompactFunction":
        """The removal of `sizes`, of no function yet: `of` names it.

        Raises:
          ValueError: indices that do not fit the shapes.
        """
        shapes = [leaf.shape for leaf in jax.tree.leaves(sizes["full"])]
        kept = []
        for shape, indices in zip(shapes, sizes["kept"], strict=True):
            pairs = zip(shape, indices, strict=True)
            kept.append(tuple(np.arange(n) if i is None else _index(i, n) for n, i in pairs))
        masked = tuple(sizes["fully_masked"])
        if not all(type(i) is int and 0 <= i < len(shapes) for i in masked):
            raise ValueError(f"fully masked leaves {masked} of {len(shapes)}")
        return cls(None, sizes["full"], kept, masked, None)

    def __getstate__(self) -> dict[str, Any]:
        for name, function in (("fn", self._fn), ("updates", self._updates)):
            try:
                pickle.dumps(function)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise TypeError(
                    f"{name}: a compact function is pickled with its function, and this one cannot be "
                    f"({error}): define it at the top level of a module, or pickle the parameters alone "
                    "and call jp.compact with the same masks again"
                ) from error
        return {**self.__dict__, "_plans": TraceCache()}

    def remember(self, args: Any, kwargs: Any, graph: Graph, found: Reduced) -> None:
        """Keeps a plan for these inputs."""
        self._plans.put(inputs_of(args, kwargs).key, (graph, found))

    def _plan(self, args: Any, kwargs: Any) -> tuple[Graph, Reduced]:
        fn = self._fn
        if fn is None:
            raise TypeError(
                "this compact function comes from a file, which holds its sizes and not its code: name "
                "the function first, compact_fn = compact_fn.of(fn)"
            )

        def make() -> tuple[Graph, Reduced]:
            graph = trace(fn, self._full, *args, updates=self._updates, **kwargs)
            masked = [
                [~np.isin(np.arange(n), index) for n, index in zip(shape, left, strict=True)]
                for shape, left in zip(graph.shapes, self._kept, strict=True)
            ]
            found = reduced(
                graph, removal_of(graph.solution, graph.own, masked, list(self._fully_masked))
            )
            self._tell(graph, found)
            return graph, found

        return self._plans.get(inputs_of(args, kwargs).key, make)

    def _tell(self, graph: Graph, found: Reduced) -> None:
        """Warns of leaves that are larger than the small ones in this trace."""
        reasons = dict(graph.frozen)
        larger = [
            f"{path}[{axis}] ({reasons.get((path, axis), 'other slices of its units stay')})"
            for path, small, left in zip(graph.paths, self._kept, found.kept, strict=True)
            for axis, (a, b) in enumerate(zip(small, left, strict=True))
            if len(a) < len(b)
        ]
        if larger:
            warnings.warn(
                f"{self.__name__}: traced anew, it cannot do without what was removed of "
                f"{', '.join(larger[:3])}{', …' if len(larger) > 3 else ''}; zeros stand there. If an "
                "output is an updated copy of parameters, name it: of(fn, updates=…)",
                stacklevel=4,
            )

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        graph, found = self._plan(args, kwargs)
        paths, leaves, _ = _trees.flatten(params)
        for path, leaf, left in zip(paths, leaves, self._kept, strict=True):
            if np.shape(leaf) != _sizes(left):
                raise ValueError(
                    f"params: leaf {path!r} has shape {np.shape(leaf)}, expected {_sizes(left)}: this "
                    "function takes the small parameters that jp.compact returned with it"
                )
        inputs = [_moved(*item) for item in zip(leaves, self._kept, found.used, strict=True)]
        outs = run(found.plan, [*inputs, *inputs_of(args, kwargs).arrays])
        for position, leaf in graph.updated.items():  # what is removed stays removed
            left = found.plan.kept[found.plan.program.outputs[position]]
            outs[position] = _moved(outs[position], left, self._kept[leaf])
        return found.plan.program.out_tree.unflatten(outs)


def _index(index: Any, size: int) -> np.ndarray:
    """Indices of the entries that are left of an axis, checked."""
    index = np.asarray(index)
    rises = index.ndim == 1 and index.dtype == np.int32 and bool((np.diff(index) > 0).all())
    if not rises or (index.size and not 0 <= index[0] <= index[-1] < size):
        raise ValueError(f"indices that do not fit an axis of {size}")
    return index


def _moved(x: Any, before: Kept, after: Kept) -> Any:
    """An array of the entries at some indices as one of those at others; zero where it had none."""
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if len(old) == len(new) and (old == new).all():
            continue
        where = np.searchsorted(old, new)
        known = np.isin(new, old)
        if not known.any():
            shape = [len(new) if i == axis else n for i, n in enumerate(x.shape)]
            x = jnp.zeros(shape, x.dtype)
            continue
        x = jnp.take(x, np.where(known, where, 0), axis=axis)
        flags = known.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        x = x if known.all() else jnp.where(flags, x, jnp.zeros((), x.dtype))
    return x


def compact(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *args: Any,
    updates: Callable[[Any], Any] | None = None,
    fold: str | None = None,
    verify: bool = False,
    **kwargs: Any,
) -> tuple[CompactFunction, Params]:
    """Removes every unit all of whose slices are masked, and every layer that is.

    `compact_fn(small_params, *args)` equals `fn(apply_masks(params, masks), *args)` up to rounding, for
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
        are `compact_fn.differences`.
      **kwargs: further example inputs.

    Returns:
      `(compact_fn, small_params)`; both jit, differentiate and map like the originals.

    Raises:
      ValueError: masks of another tree; masks that leave no path from the inputs to an output; an `fn`
        that cannot be traced; with `verify`, results that differ.
      TypeError: inputs that `fn` needs are missing; a static argument that is not hashable.

    Warns:
      UserWarning: slices that are masked as a unit and stay, with the reason.

    Example:
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> keep = jnp.arange(8) < 6
      >>> masks = {"a": keep[None], "b": keep[:, None]}
      >>> compact_fn, small = jp.compact(fn, params, masks, jnp.ones((1, 4)), verify=True)
      >>> small["a"].shape, small["b"].shape, compact_fn.differences
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
    _tell_stuck(graph, removal, flags)
    small = [cut(*item) for item in zip(leaves, flags, found.kept, strict=True)]
    full = graph.treedef.unflatten(
        jax.ShapeDtypeStruct(shape, leaf.dtype)
        for shape, leaf in zip(graph.shapes, leaves, strict=True)
    )
    compact_fn = CompactFunction(fn, full, found.kept, removal.fully_masked, updates)
    compact_fn.remember(args, kwargs, graph, found)
    small_params = graph.treedef.unflatten(small)
    if verify:
        if reference is None:
            masked = [_masked(leaf, flag) for leaf, flag in zip(leaves, flags, strict=True)]
            reference = _jitted(fn, given)(graph.treedef.unflatten(masked))
        else:
            reference = graph.program.out_tree.unflatten(reference)
        result = _jitted(compact_fn, given)(small_params)
        compact_fn.differences = _differences(graph, reference, result)
    return compact_fn, small_params


def _jitted(fn: Callable[..., Any], inputs: Inputs) -> Callable[[Params], Any]:
    def call(params: Params, arrays: list[Any]) -> Any:
        args, kwargs = inputs.rebuild(arrays)
        return fn(params, *args, **kwargs)

    return lambda params: jax.jit(call)(params, inputs.arrays)


def _sizes(left: tuple[np.ndarray, ...]) -> tuple[int, ...]:
    return tuple(len(index) for index in left)


def _tell_stuck(graph: Graph, removal: Removal, masks: list[Any]) -> None:
    """Warns of what is masked and stays."""
    stuck = stuck_slices(graph, removal, masks)
    if stuck:
        listed = "; ".join(
            f"{n} slices of {name}: {why}" for name, (n, why) in [*stuck.items()][:4]
        )
        warnings.warn(
            f"compact: masked, but kept: {listed}{'; …' if len(stuck) > 4 else ''}", stacklevel=3
        )


def _check_reached(graph: Graph, found: Reduced, masks: Masks) -> None:
    """Refuses masks that leave no path from the inputs to an output that had one."""
    lost = [position for position in found.disconnected if position not in graph.updated]
    if not lost:
        return
    flags = graph.treedef.flatten_up_to(masks)
    masked = [p for p, flag in zip(graph.paths, flags, strict=True) if not np.any(np.asarray(flag))]
    raise ValueError(
        f"masks: nothing of the inputs reaches output {lost[0]} any more; nothing is left of "
        f"{', '.join(masked[:4])}{', …' if len(masked) > 4 else ''}; keep at least one unit of each "
        "layer that has no other path around it"
    )


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
                f"verify: output {path!r} of the compact function differs by {difference:.3g} from the "
                f"masked one, more than {allowed:.3g}; please report this with the function"
            )
    return found


def _precise(graph: Graph) -> bool:
    """No value of the function has fewer than 32 bits to round to."""
    dtypes = {
        aval.dtype for aval in graph.program.avals if jnp.issubdtype(aval.dtype, jnp.floating)
    }
    return all(jnp.finfo(dtype).bits >= 32 for dtype in dtypes)
