"""Whether a compact function does what the masked one does, over two calls where calls leave states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import Params, PyTree
from jaxprune.graph import Graph, Kept, Reduced
from jaxprune.program import Inputs
from jaxprune.structure._function import CompactFunction, moved


class Sides(NamedTuple):
    """What is compared.

    Attributes:
      graph: of the function.
      found: what is left of it.
      given: example inputs, whole.
      given_small: example inputs of the compact function.
      flags: mask of each leaf.
      states: full shape and what is left of each state, by name.
    """

    graph: Graph
    found: Reduced
    given: Inputs
    given_small: Inputs
    flags: list[Any]
    states: dict[str, tuple[tuple[int, ...], Kept]]


def compared(
    both: Sides,
    fn: Callable[..., Any],
    leaves: list[Any],
    compact_fn: CompactFunction,
    small: list[Any],
) -> dict[str, float]:
    """Per output the largest difference in one call, or in two where one leaves what the next takes.

    Args:
      both: what is compared.
      fn: the function.
      leaves: its parameters, not masked.
      compact_fn: the compact function.
      small: its parameters.

    Raises:
      ValueError: a difference beyond rounding.
    """
    masked = [_masked(leaf, flag) for leaf, flag in zip(leaves, both.flags, strict=True)]
    arrays = _without_removed(both, list(both.given.arrays))
    ours = list(both.given_small.arrays)
    found: dict[str, float] = {}
    for call in ("", " in a second call, with what the first one left,"):
        expected = _called(fn, both.given, both.graph, masked, arrays)
        got = _called(compact_fn, both.given_small, both.graph, small, ours)
        now = _differences(both, expected, got, call)
        found = {path: max(now[path], found.get(path, 0.0)) for path in now}
        theirs, mine = _after(both, (masked, arrays), expected), _after(both, (small, ours), got)
        if theirs is None or mine is None:
            break
        (masked, arrays), (small, ours) = theirs, mine
        masked = [_masked(leaf, flag) for leaf, flag in zip(masked, both.flags, strict=True)]
        arrays = _without_removed(both, arrays)
    return found


def compared_once(
    both: Sides, expected: PyTree, compact_fn: CompactFunction, small: list[Any]
) -> dict[str, float]:
    """Likewise for one call whose results are known."""
    got = _called(compact_fn, both.given_small, both.graph, small, both.given_small.arrays)
    return _differences(both, expected, got, "")


def _called(
    fn: Callable[..., Any], inputs: Inputs, graph: Graph, leaves: list[Any], arrays: list[Any]
) -> PyTree:
    def call(params: Params, arrays: list[Any]) -> Any:
        args, kwargs = inputs.rebuild(arrays)
        return fn(params, *args, **kwargs)

    return jax.jit(call)(graph.treedef.unflatten(leaves), arrays)


def _without_removed(both: Sides, arrays: list[Any]) -> list[Any]:
    """Inputs whose states are zero where they are removed."""
    for state in both.graph.state_leaves:
        shape, left = both.states[state.name]
        whole = tuple(np.arange(n) for n in shape)
        arrays[state.input] = moved(moved(arrays[state.input], whole, left), left, whole)
    return arrays


def _after(
    both: Sides, before: tuple[list[Any], list[Any]], result: PyTree
) -> tuple[list[Any], list[Any]] | None:
    """Parameters and inputs of the next call; `None` where a call leaves nothing, or of another size."""
    outs = jax.tree.leaves(result)
    leaves, arrays = (list(x) for x in before)
    graph = both.graph
    moves = [(leaves, i, position) for position, i in graph.updated.items()]
    moves += [(arrays, s.input, s.output) for s in graph.state_leaves if s.output is not None]
    for place, i, position in moves:
        if np.shape(place[i]) != np.shape(outs[position]):
            return None
        place[i] = outs[position]
    return (leaves, arrays) if moves else None


def _masked(leaf: Any, flag: Any) -> Any:
    return leaf if np.asarray(flag).all() else jnp.where(flag, leaf, jnp.zeros((), leaf.dtype))


def _differences(both: Sides, reference: PyTree, result: PyTree, call: str) -> dict[str, float]:
    """Per output the largest difference; updated parameters and states where something is left of them.

    Raises:
      ValueError: a difference beyond rounding.
    """
    graph, cut_to = both.graph, both.found
    found = {}
    tolerance = 1e-3 if _precise(graph) else 0.1
    paths, expected, _ = _trees.flatten(reference)
    for position, (path, a, b) in enumerate(
        zip(paths, expected, jax.tree.leaves(result), strict=True)
    ):
        twin = graph.updated.get(position)
        number = graph.program.outputs[position]
        if jnp.issubdtype(a.dtype, jax.dtypes.extended):  # keys of random numbers
            continue
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        a = a[np.ix_(*(cut_to.plan.kept[number] if twin is None else cut_to.kept[twin]))]
        difference = float(np.max(np.abs(a - b), initial=0.0))
        found[path or "output"] = difference
        allowed = tolerance * max(float(np.max(np.abs(a), initial=0.0)), 1e-3)
        if not difference <= allowed:
            raise ValueError(
                f"verify: output {path!r} of the compact function differs{call} by {difference:.3g} from "
                f"the masked one, more than {allowed:.3g}; please report this with the function"
            )
    return found


def _precise(graph: Graph) -> bool:
    """No value of the function has fewer than 32 bits to round to."""
    dtypes = {
        aval.dtype for aval in graph.program.avals if jnp.issubdtype(aval.dtype, jnp.floating)
    }
    return all(jnp.finfo(dtype).bits >= 32 for dtype in dtypes)
