"""The coupling graph of a function: which axes of which parameters shrink together, and which cannot."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree
from jaxprune.graph._axes import AxisInfo
from jaxprune.graph._choose import GroupWhere, Only, chosen_groups
from jaxprune.graph._constraints import Constraints, Solution
from jaxprune.graph._cost import Cost, cost_of
from jaxprune.graph._groups import Group, frozen_of, groups_of, labelled
from jaxprune.graph._kinds import kinds_of
from jaxprune.graph._leaf_flops import leaf_flops
from jaxprune.graph._removal import Removal, masked_slices, removal_of
from jaxprune.graph._states import StateLeaf, States, state_leaves
from jaxprune.graph._summary import Summary, reasons_of, share_of_parameters
from jaxprune.graph._tabulate import table_of
from jaxprune.graph._walk import couple, walk
from jaxprune.graph._zeros import Work, needed_work, removed_leaves
from jaxprune.program import (
    Flow,
    Program,
    inputs_of,
    is_symbolic,
    trace_program,
    uses_of_program,
)


@dataclass(frozen=True, repr=False)
class Graph:
    """A traced function; made by `jp.trace`.

    Attributes:
      fn: the function.
      updates: what part of its output is an updated copy of parameters, see `trace`.
      paths: path of each leaf of the parameters, in flatten order.
      shapes: shape of each leaf.
      treedef: structure of the parameters.
      program: the operations.
      axes: ids of each value of the program, those of inner programs too.
      solution: of the constraints.
      updated: which outputs are updated copies of which leaves, by position.
      unread: positions of leaves that the function never reads.
      states: arguments that are states, as given to `trace`.
      state_leaves: their arrays.
      iterations: units that are iterations of scans over stacked layers.
    """

    fn: Callable[..., Any]
    updates: Callable[[Any], Any] | None
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    treedef: Any
    program: Program
    axes: tuple[AxisInfo, ...]
    solution: Solution
    updated: dict[int, int]
    iterations: frozenset[int]
    unread: frozenset[int]
    states: States
    state_leaves: tuple[StateLeaf, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """What can shrink."""
        found = groups_of(self.paths, self.own, self.solution, self.iterations)
        n_params = len(self.paths)
        states = [self.program.inputs[n_params + state.input] for state in self.state_leaves]
        flow = Flow(self.program, n_params)
        kinds = kinds_of(flow, self.axes, self.solution, found, states)
        return tuple(labelled(found, kinds, self.paths))

    @cached_property
    def frozen(self) -> tuple[tuple[tuple[str, int], str], ...]:
        """`((path, axis), reason)` for what cannot, or not all of it."""
        return frozen_of(self.paths, self.own, self.solution)

    @cached_property
    def uses(self) -> PyTree:
        """What the function does with each parameter: tree of `jaxprune.Uses`, see `jp.uses`."""
        return self.treedef.unflatten(uses_of_program(self.program, len(self.paths)))

    @cached_property
    def leaf_flops(self) -> tuple[float, ...]:
        """FLOPs of the products with each leaf, in flatten order; see `jp.budgets.flops`."""
        return leaf_flops(self.program, self.axes, len(self.paths))

    def for_inputs(self, params: Params, *args: Any, **kwargs: Any) -> "Graph":
        """The graph of the same function for inputs of these shapes."""
        inputs = inputs_of(args, kwargs).arrays
        traced = [self.program.avals[i] for i in self.program.inputs[len(self.paths) :]]
        if [np.shape(x) for x in inputs] == [tuple(aval.shape) for aval in traced]:
            return self
        return trace(self.fn, params, *args, updates=self.updates, states=self.states, **kwargs)

    def cost(self, masks: Masks | None = None) -> Cost:
        """What a call costs: FLOPs, multiply-adds and bytes, per operation and in total.

        Args:
          masks: tree of bools like the parameters: the cost once the units that they mask are removed.
            Nothing is by default.
        """
        if masks is None:
            return self.cost_without(None)
        removal = self.removal(masks)
        work = needed_without(self, removal.fully_masked)[0] if removal.fully_masked else None
        return self.cost_without(removal.ids, work)

    def cost_without(self, removed: np.ndarray | None, work: Work | None = None) -> Cost:
        """What a call costs without some ids, and of some of its operations."""
        program = self.program
        if self.is_symbolic:
            raise ValueError(
                "cost: the graph was traced with symbolic sizes, of which no cost is known; trace with "
                "inputs of some size"
            )
        if work is not None:
            program = dataclasses.replace(program, operations=work.operations)
        return cost_of(program, self.axes, len(self.paths), removed)

    def summary(self) -> Summary:
        """How much can go: shares of parameters and FLOPs, and what keeps the rest, with cures.

        Example:
          >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
          >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
          >>> found = jp.trace(fn, params, jnp.ones((1, 4))).summary()
          >>> found.parameters, [reason.text for reason in found.reasons]
          (1.0, ['tied to axis 1 of input args[0]', 'reaches output 0'])
        """
        flops = None
        if not self.is_symbolic:
            all_units = np.zeros(len(self.solution.reason), bool)
            for group in self.groups:
                all_units[group.units] = True
            left = self.cost_without(self.solution.removed(all_units)).flops
            total = self.cost_without(None).flops
            flops = 1 - left / total if total else 0.0
        return Summary(
            share_of_parameters(self.own, self.solution),
            flops,
            len(self.groups),
            reasons_of(self.paths, self.shapes, self.frozen),
        )

    def removal(self, masks: Masks) -> Removal:
        """The units that masks remove."""
        masks = _checks.aligned(
            "masks", masks, "the traced params", self.treedef.unflatten(self.paths)
        )
        flags = self.treedef.flatten_up_to(masks)
        return removal_of(self.solution, self.own, *masked_slices(self.shapes, flags))

    @property
    def is_symbolic(self) -> bool:
        """Whether inputs have symbolic sizes."""
        return any(is_symbolic(self.program.avals[i].shape) for i in self.program.inputs)

    @property
    def own(self) -> list[AxisInfo]:
        """The axes of each parameter leaf."""
        return [self.axes[i] for i in self.program.inputs[: len(self.paths)]]

    @property
    def table(self) -> Table:
        """Groups, and frozen axes with their reasons, as a `rich` table; see `tabulate`."""
        return self.tabulate()

    def tabulate(
        self, *, only: Only = None, where: GroupWhere = None, every: bool = False
    ) -> Table:
        """Groups with their shares of the parameters and FLOPs, and frozen axes with their reasons.

        FLOPs are those of products with parameters. A matrix between two groups counts for both.

        Args:
          only, where: the groups to show, see `jp.structure.unit_masks`; without frozen axes then.
          every: show all members of groups, and axes that are never pruned: those of one entry, and
            windows (space of kernels).

        Returns:
          The table.

        Raises:
          ValueError: kinds and patterns that fit no group.

        Example:
          >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
          >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 4)))
          >>> graph.tabulate(only="neurons").row_count
          1
        """
        groups = chosen_groups(self.groups, only=only, where=where)
        frozen = self.frozen if only is None and where is None else ()
        flops = None if self.is_symbolic else self.leaf_flops
        return table_of(groups, self.own, self.solution, flops, frozen, every=every)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        total = sum(int(np.prod(shape)) for shape in self.shapes)
        kinds = Counter(group.kind for group in self.groups)
        known = ", ".join(f"{count} of {kind}" for kind, count in kinds.items()) or "none"
        return (
            f"Graph({name}: {len(self.paths)} leaves, {total:,} parameters; groups: {known}; "
            f"{len(self.frozen)} frozen axes)"
        )

    def __rich__(self) -> Table:
        return self.table


def trace(
    fn: Callable[..., Any],
    params: Params,
    *args: Any,
    updates: Callable[[Any], Any] | None = None,
    states: States | None = None,
    **kwargs: Any,
) -> Graph:
    """Traces `fn(params, *args, **kwargs)` and finds what must shrink together.

    The function runs abstractly, once; nothing is computed. Arguments may be `jax.ShapeDtypeStruct`.

    Args:
      fn: any traceable function of parameters and inputs: a linen `apply`, a function of an `nnx.State`,
        plain JAX code.
      params: its parameters, any tree of arrays.
      *args: example inputs, of any batch size. Bools, ints and strings (`train=False`) keep their value.
      updates: names the part of the output that is an updated copy of parameters, such as Flax's mutable
        collections: `lambda out: out[1]`. Those axes shrink with the parameters; all others of the
        output are frozen.
      states: arguments that are no parameters and shrink with them, such as key-value caches and
        recurrent states, and what part of the output updates each: `{"cache": lambda out: out[1]}`, by
        name or by position after the parameters; `None` for one that is only read. They count as zero
        where units are masked, if what is written there is.
      **kwargs: further inputs.

    Returns:
      A `Graph`.

    Raises:
      TypeError: inputs that `fn` needs are missing.
      ValueError: `fn` cannot be traced, for instance because it branches on the value of an array (the
        error names the line), `updates` names leaves that are no parameters, or `states` names arguments
        or outputs that are none. What `fn` itself raises is passed on.

    Example:
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 4)))
      >>> [(group.size, group.members) for group in graph.groups]
      [(8, (('a', 1), ('b', 0)))]
    """
    paths, leaves, treedef = _trees.flatten(params)
    program = trace_program(fn, params, *args, **kwargs)
    updated = updated_leaves(program, paths, updates)
    states = dict(states or {})
    carried = state_leaves(fn, program, states, args, kwargs)
    names = inputs_of(args, kwargs).names
    unread = unread_leaves(program, len(leaves))
    constraints, axes = couple(program, len(leaves), updated, names, carried)
    for position in unread:
        for ids in axes[program.inputs[position]].ids:
            constraints.freeze(ids, "not read")
    solution = constraints.solve()
    shapes = tuple(tuple(np.shape(leaf)) for leaf in leaves)
    steps = np.concatenate([*constraints.iterations, np.zeros(0, np.int64)])
    return Graph(
        fn,
        updates,
        tuple(paths),
        shapes,
        treedef,
        program,
        axes,
        solution,
        updated,
        frozenset(np.unique(solution.label[steps]).tolist()),
        unread,
        states,
        carried,
    )


def updated_leaves(
    program: Program, paths: Sequence[str], updates: Callable[[Any], Any] | None
) -> dict[int, int]:
    """Which outputs `updates` names, and the parameter of the same path, by position.

    Raises:
      ValueError: an updated leaf without a parameter of its path.
    """
    if updates is None:
        return {}
    numbered = program.out_tree.unflatten(range(len(program.outputs)))
    names, positions, _ = _trees.flatten(updates(numbered))
    known = {path: i for i, path in enumerate(paths)}
    for name in names:
        if name not in known:
            raise ValueError(
                f"updates: leaf {name!r} is no path of params; nearest: {paths[:3]}. Return the updated "
                "collections under the names that they have in params, e.g. lambda out: out[1]"
            )
    return {position: known[name] for name, position in zip(names, positions, strict=True)}


def unread_leaves(program: Program, n_params: int) -> frozenset[int]:
    """Positions of the parameters that nothing reads: no operation but views, and no output."""
    flow = Flow(program, n_params)
    return frozenset(i for number, i in flow.leaves.items() if not flow.readers(number))


def needed_without(graph: Graph, masked: tuple[int, ...]) -> tuple[Work, set[int]]:
    """The work that is left when some leaves are zero, and the inputs that are removed with them."""
    program, n_params = graph.program, len(graph.paths)
    ins = [graph.axes[i] for i in program.inputs]
    for position in masked:
        ins[position] = AxisInfo(ins[position].ids, ins[position].zero, 0.0)
    scratch = Constraints()
    scratch.is_symbolic = graph.is_symbolic
    walk(program, ins, scratch)
    work = needed_work(program, scratch.values)
    numbers = [program.inputs[position] for position in masked]
    return work, set(removed_leaves(program, work, numbers, n_params))
