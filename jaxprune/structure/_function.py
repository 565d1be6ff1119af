"""The function that `jp.compact` makes: a program at smaller sizes, planned anew for each shape."""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree
from jaxprune.graph import (
    Graph,
    Kept,
    Reduced,
    States,
    full_sizes,
    reduced,
    removal_of,
    state_inputs,
    state_name,
    trace,
)
from jaxprune.graph import evaluate as run
from jaxprune.program import TraceCache, inputs_of


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
        states: States | None = None,
        state_sizes: dict[str, tuple[tuple[int, ...], Kept]] | None = None,
        zero_states: frozenset[str] | None = None,
    ) -> None:
        """Made by `jp.compact`; without `fn`, by `from_sizes`."""
        self._fn, self._full, self._updates = fn, full, updates
        self._states, self._state_sizes = states or {}, state_sizes or {}
        self._zero_states = frozenset(self._state_sizes) if zero_states is None else zero_states
        self._kept, self._fully_masked = kept, fully_masked
        self.differences: dict[str, float] | None = None
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__wrapped__ = fn
        self._plans = TraceCache()

    def __repr__(self) -> str:
        sizes = [len(leaf) for leaf in self._kept]
        small = sum(int(np.prod([len(index) for index in leaf])) for leaf in self._kept)
        full = sum(int(np.prod(np.shape(x))) for x in _trees.flatten(self._full)[1])
        return f"CompactFunction({self.__name__}: {small:,} of {full:,} parameters, {len(sizes)} leaves)"

    def of(
        self,
        fn: Callable[..., Any],
        *,
        updates: Callable[[Any], Any] | None = None,
        states: States | None = None,
    ) -> "CompactFunction":
        """Another function of the same parameters, such as the network in train mode, at these sizes.

        Args:
          fn: the function.
          updates: the part of its output that is an updated copy of parameters, see `jp.trace`.
          states: its arguments that are states, under the names that they had in `jp.compact`.
        """
        own = self._state_sizes, self._zero_states
        return CompactFunction(
            fn, self._full, self._kept, self._fully_masked, updates, states, *own
        )

    def small_state(self, key: int | str, state: PyTree) -> PyTree:
        """A state of the original function, such as an empty cache, as this function takes it.

        Args:
          key: the argument, as named in `states=`.
          state: arrays, or `jax.ShapeDtypeStruct`.

        Raises:
          ValueError: a state that the function does not have, or of another size.

        Warns:
          UserWarning: what is cut is not zero, though the function counts on it: sums over it differ from
            those of the masked function that starts with this state.

        Example:
          >>> fn = lambda p, x, cache: ((y := cache + x @ p["a"]) @ p["b"], y)
          >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
          >>> keep = jnp.arange(8) < 6
          >>> masks = {"a": keep[None], "b": keep[:, None]}
          >>> cache, states = jnp.zeros((1, 8)), {"cache": lambda out: out[1]}
          >>> small_fn, small = jp.compact(fn, params, masks, jnp.ones((1, 4)), cache, states=states)
          >>> cache = small_fn.small_state("cache", cache)
          >>> y, cache = small_fn(small, jnp.ones((1, 4)), cache)
          >>> cache.shape
          (1, 6)
        """
        paths, leaves, treedef = _trees.flatten(state)
        found = []
        for path, leaf in zip(paths, leaves, strict=True):
            name = state_name(key, path)
            if name not in self._state_sizes:
                if not hasattr(leaf, "dtype"):
                    found.append(leaf)
                    continue
                raise ValueError(
                    f"state: {name!r} is no state of this function; it has {[*self._state_sizes]}"
                )
            found.append(small_state_leaf(name, leaf, *self._state_sizes[name], self._zero_states))
        return treedef.unflatten(found)

    def sizes(self) -> dict[str, Any]:
        """What was removed, as a tree that goes to files. Inverse of `from_sizes`."""
        shapes = [leaf.shape for leaf in jax.tree.leaves(self._full)]
        kept = [
            [None if len(i) == n else np.asarray(i, np.int32) for n, i in zip(*pair, strict=True)]
            for pair in zip(shapes, self._kept, strict=True)
        ]
        states = {
            name: {"shape": list(shape), "kept": [np.asarray(i, np.int32) for i in left]}
            for name, (shape, left) in self._state_sizes.items()
        }
        found = {"full": self._full, "kept": kept, "fully_masked": list(self._fully_masked)}
        return {**found, "states": states} if states else found

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
        states = {}
        for name, known in sizes.get("states", {}).items():
            pairs = zip(known["shape"], known["kept"], strict=True)
            states[name] = (tuple(known["shape"]), tuple(_index(i, n) for n, i in pairs))
        return cls(None, sizes["full"], kept, masked, None, None, states)

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
            given = inputs_of(args, kwargs)
            own = state_inputs(fn, given, self._states, args, kwargs)
            names = {i: state_name(*place) for i, place in own.items()}
            whole, named = given.rebuild(full_sizes(given, names, self._state_sizes))
            how = {"updates": self._updates, "states": self._states}
            graph = trace(fn, self._full, *whole, **how, **named)
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
        params = _checks.aligned("params", params, "the params of jp.compact", self._full)
        paths, leaves, _ = _trees.flatten(params)
        for path, leaf, left in zip(paths, leaves, self._kept, strict=True):
            if np.shape(leaf) != _sizes(left):
                raise ValueError(
                    f"params: leaf {path!r} has shape {np.shape(leaf)}, expected {_sizes(left)}: this "
                    "function takes the small parameters that jp.compact returned with it"
                )
        inputs = [moved(*item) for item in zip(leaves, self._kept, found.used, strict=True)]
        arrays, plan = list(inputs_of(args, kwargs).arrays), found.plan
        for state in graph.state_leaves:
            used = plan.kept[plan.program.inputs[len(leaves) + state.input]]
            arrays[state.input] = moved(arrays[state.input], self._own(state.name, used), used)
        outs = run(plan, [*inputs, *arrays])
        for position, leaf in graph.updated.items():  # what is removed stays removed
            left = plan.kept[plan.program.outputs[position]]
            outs[position] = moved(outs[position], left, self._kept[leaf])
        for state in graph.state_leaves:
            if state.output is not None:
                left = plan.kept[plan.program.outputs[state.output]]
                outs[state.output] = moved(outs[state.output], left, self._own(state.name, left))
        return plan.program.out_tree.unflatten(outs)

    def _own(self, name: str, seen: Kept) -> Kept:
        """The indices of a state that this function holds, where `seen` are those of one trace."""
        full, kept = self._state_sizes[name]
        return tuple(
            index if len(index) < n else there
            for n, index, there in zip(full, kept, seen, strict=True)
        )


def small_state_leaf(
    name: str, leaf: Any, full: tuple[int, ...], kept: Kept, zero: frozenset[str]
) -> Any:
    """A leaf of a state without what is removed; axes of which nothing is may have any size."""
    cuts = [axis for axis, (n, index) in enumerate(zip(full, kept, strict=True)) if len(index) < n]
    shape = list(np.shape(leaf))
    if len(shape) != len(full) or any(shape[axis] != full[axis] for axis in cuts):
        raise ValueError(f"state: {name!r} has shape {tuple(shape)}, expected {full}")
    for axis in cuts:
        shape[axis] = len(kept[axis])
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    if name in zero and not _checks.is_traced(leaf):
        gone = [np.delete(np.arange(full[axis]), kept[axis]) for axis in cuts]
        if any(np.any(jnp.take(leaf, g, axis=a)) for a, g in zip(cuts, gone, strict=True)):
            warnings.warn(
                f"state {name!r}: what is cut of it is not zero, as it is taken to be; where sums run "
                "over it, results differ from those of the masked function",
                stacklevel=4,
            )
    for axis in cuts:
        leaf = jnp.take(leaf, kept[axis], axis=axis)
    return leaf


def _index(index: Any, size: int) -> np.ndarray:
    """Indices of the entries that are left of an axis, checked."""
    index = np.asarray(index)
    rises = index.ndim == 1 and index.dtype == np.int32 and bool((np.diff(index) > 0).all())
    if not rises or (index.size and not 0 <= index[0] <= index[-1] < size):
        raise ValueError(f"indices that do not fit an axis of {size}")
    return index


def moved(x: Any, before: Kept, after: Kept) -> Any:
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


def _sizes(left: tuple[np.ndarray, ...]) -> tuple[int, ...]:
    return tuple(len(index) for index in left)
