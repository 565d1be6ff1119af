"""The measured time of a traced function without some of its units."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._progress import track
from jaxprune._timing import in_turns
from jaxprune.graph import Graph, evaluate, reduced
from jaxprune.structure._scoring import masks_without

_CANDIDATES = 6
_SECONDS = 1.0


def search_latency(graph: Graph, choose: Callable[[float], np.ndarray], value: float) -> np.ndarray:
    """The least removal found whose time is at most `value` of the dense one, by bisection.

    Each candidate is compiled and timed in turns with the dense function; what is chosen met the target
    twice, so that one quiet moment does not decide.
    """
    if graph.is_symbolic:
        raise ValueError(
            "latency: the graph was traced with symbolic sizes; trace with inputs to measure"
        )
    timer = _Timer(graph)
    most = choose(1.0)
    if timer(most) > value and timer(most) > value:
        raise ValueError(
            f"latency: {value:g} is out of reach on {jax.default_backend()}: with everything removed "
            f"that may be, a call takes {timer(most):.2f} of the dense time; lower min_units, ignore "
            "less, or trace with larger inputs if a call takes microseconds"
        )
    low, high, met = 0.0, 1.0, [most]
    for _ in track(range(_CANDIDATES), "latency"):
        middle = (low + high) / 2
        removed = choose(middle)
        if timer(removed) <= value:
            high = middle
            met.append(removed)
        else:
            low = middle
    for removed in met[:0:-1]:
        if timer(removed) <= value:
            return removed
    return most


class _Timer:
    """Times as fractions of the dense function's; what was compiled is kept."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._compiled: dict[bytes, Callable[[], Any]] = {}
        self._dense = self._call(np.zeros(len(graph.solution.reason), bool))

    def _call(self, removed: np.ndarray) -> Callable[[], Any]:
        key = removed.tobytes()
        if key not in self._compiled:
            graph = self._graph
            found = reduced(graph, graph.removal(masks_without(graph, removed)))
            n_params = len(graph.paths)
            shapes = [tuple(len(index) for index in left) for left in found.used]
            avals = [graph.program.avals[i] for i in graph.program.inputs]
            shapes += [tuple(aval.shape) for aval in avals[n_params:]]
            arrays = [_example(s, aval.dtype) for s, aval in zip(shapes, avals, strict=True)]
            run = jax.jit(lambda arrays: evaluate(found.plan, arrays))
            self._compiled[key] = lambda: run(arrays)
        return self._compiled[key]

    def __call__(self, removed: np.ndarray) -> float:
        """The median over rounds of this call's time over the dense one's."""
        calls = {"dense": self._dense, "small": self._call(removed)}
        seconds = in_turns(calls, rounds=40, budget=_SECONDS)
        return float(np.median(seconds["small"] / seconds["dense"]))


def _example(shape: tuple[int, ...], dtype: Any) -> Any:
    """Numbers of ordinary size: positive vectors (variances), matrices that keep the scale of rows."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        keys = jax.random.split(jax.random.key(0), max(int(np.prod(shape)), 1))
        return keys.reshape(shape)
    rng = np.random.default_rng(0)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros(shape, dtype)
    if len(shape) < 2:
        return jnp.asarray(rng.uniform(0.5, 1.0, shape), dtype)
    return jnp.asarray(rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]), 1)), dtype)
