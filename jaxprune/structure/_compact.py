"""Masked units removed for good: a smaller function and smaller parameters."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune import _checks
from jaxprune._progress import stages
from jaxprune._types import Masks, Params
from jaxprune.graph import Graph, Kept, Reduced, Removal, States, reduced, trace
from jaxprune.program import inputs_of
from jaxprune.structure._fold import FOLDS, folded
from jaxprune.structure._function import CompactFunction, small_state_leaf
from jaxprune.structure._shrink import cut, stuck_slices
from jaxprune.structure._verify import Sides, compared, compared_once


def compact(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *args: Any,
    updates: Callable[[Any], Any] | None = None,
    states: States | None = None,
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
      states: arguments that are no parameters and shrink with them, such as caches, see `jp.trace`. The
        compact function takes and returns small ones: `compact_fn.small_state(name, state)` cuts the
        first.
      fold: what to keep of units that go, moved into the biases (or BatchNorm means) behind them. `None`:
        nothing. `"constants"`: what a unit contributes when nothing reaches it any more but its own
        bias, BatchNorm shift or an activation that is not zero at zero. `"mean"`: what it contributes on
        average over the example inputs, where places with large sums count less. Both move sums
        exactly, up to the borders of padded convolutions.
      verify: compare both functions on the example inputs and refuse where they differ; the differences
        are `compact_fn.differences`. Where a call leaves updated parameters or states, these are compared
        too, and so is a second call that takes them (not with `fold`).
      **kwargs: further example inputs.

    Returns:
      `(compact_fn, small_params)`; both jit, differentiate and map like the originals.

    Raises:
      ValueError: masks of another tree; masks that leave no path from the inputs to an output; an `fn`
        that cannot be traced; with `verify`, results that differ.
      TypeError: inputs that `fn` needs are missing; a static argument that is not hashable.

    Warns:
      UserWarning: slices that are masked as a unit and stay, with the reason; a state that is not zero
        where it is cut, though it counts as such.

    Example:
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> keep = jnp.arange(8) < 6
      >>> masks = {"a": keep[None], "b": keep[:, None]}
      >>> compact_fn, small = jp.compact(fn, params, masks, jnp.ones((1, 4)), verify=True)
      >>> small["a"].shape, small["b"].shape, compact_fn.differences
      ((4, 6), (6, 2), {'output': 0.0})
    """
    masks = _checks.masks_fit(masks, params)
    _checks.choice("fold", fold, (None, *FOLDS))
    _checks.all_dense("params", params, "compact before quantizing, clustering or tying")
    with stages("compact") as stage:
        stage("tracing")
        graph = trace(fn, params, *args, updates=updates, states=states, **kwargs)
        removal = graph.removal(masks)
        found = reduced(graph, removal)
        _check_reached(graph, found, masks)
        stage(f"cutting {len(graph.paths)} leaves")
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
        own = _state_sizes(graph, found)
        zero = _zero_states(graph, own)
        compact_fn = CompactFunction(
            fn, full, found.kept, removal.fully_masked, updates, graph.states, own, zero
        )
        arrays = list(given.arrays)
        for state in graph.state_leaves:
            arrays[state.input] = small_state_leaf(
                state.name, arrays[state.input], *own[state.name], zero
            )
        given_small = given._replace(arrays=list(arrays))
        small_args, small_kwargs = given.rebuild(arrays)
        compact_fn.remember(small_args, small_kwargs, graph, found)
        small_params = graph.treedef.unflatten(small)
        if verify:
            stage("compiling and comparing both functions")
            both = Sides(graph, found, given, given_small, flags, own)
            if reference is None:
                compact_fn.differences = compared(both, fn, leaves, compact_fn, small)
            else:
                out = graph.program.out_tree.unflatten(reference)
                compact_fn.differences = compared_once(both, out, compact_fn, small)
    return compact_fn, small_params


def _state_sizes(graph: Graph, found: Reduced) -> dict[str, tuple[tuple[int, ...], Kept]]:
    """Full shape and what is left of each state, by name."""
    numbers = graph.program.inputs[len(graph.paths) :]
    return {
        state.name: (
            found.plan.full[numbers[state.input]],
            found.plan.kept[numbers[state.input]],
        )
        for state in graph.state_leaves
    }


def _zero_states(graph: Graph, sizes: dict[str, tuple[tuple[int, ...], Kept]]) -> frozenset[str]:
    """Names of the states that count as zero where they are cut."""
    numbers, found = graph.program.inputs[len(graph.paths) :], set()
    for state in graph.state_leaves:
        axes = zip(*sizes[state.name], graph.axes[numbers[state.input]].zero, strict=True)
        if any(len(left) < n and flags.any() for n, left, flags in axes):
            found.add(state.name)
    return frozenset(found)


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
