"""The coupling graph of a function: which axes of which parameters shrink together, and which cannot."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree
from jaxprune.graph._axes import AxisInfo, fresh_axes, input_axes, no_rule
from jaxprune.graph._constraints import Constraints, Solution
from jaxprune.graph._cost import Cost, cost_of
from jaxprune.graph._couple import RULES
from jaxprune.graph._groups import Group, frozen_of, groups_of
from jaxprune.graph._leaf_flops import leaf_flops
from jaxprune.graph._nested import nested_rule
from jaxprune.graph._removal import Removal, masked_slices, removal_of
from jaxprune.graph._states import StateLeaf, States, state_leaves
from jaxprune.graph._zeros import Work, needed_work, removed_leaves
from jaxprune.program import (
    Flow,
    Program,
    inputs_of,
    is_symbolic,
    sized,
    trace_program,
    uses_of_program,
)


@dataclass(frozen=True)
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
        return groups_of(self.paths, self.own, self.solution, self.iterations)

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
        """Groups, and frozen axes with their reasons, as a `rich` table."""
        table = Table(title="Coupling graph")
        for column in ("group", "units", "axes that shrink together, or why one cannot"):
            table.add_column(column, overflow="fold")
        for group in self.groups:
            members = ", ".join(f"{path}[{axis}]" for path, axis in group.members)
            units = f"{group.size} layers" if group.kind == "layers" else str(group.size)
            table.add_row(group.name, units, members)
        for (path, axis), reason in self.frozen:
            table.add_row(f"{path}[{axis}]", "frozen", reason)
        return table

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


def couple(
    program: Program,
    n_params: int,
    updated: dict[int, int],
    names: Sequence[str],
    states: Sequence[StateLeaf] = (),
) -> tuple[Constraints, tuple[AxisInfo, ...]]:
    """Constraints, and the axes of every value of a program.

    Args:
      program: the program.
      n_params: how many of its first inputs are parameters.
      updated: which outputs are updated copies of which parameters, by position.
      names: of the other inputs.
      states: inputs that shrink with the parameters.
    """
    zero: dict[int, tuple[np.ndarray, ...]] = {}
    while True:  # states count as zero where they are masked, until what is written there is not
        constraints, axes = _coupled(program, n_params, updated, names, states, zero)
        known = {state.input: axes[program.inputs[n_params + state.input]].zero for state in states}
        zero = {state.input: _zero_after(program, axes, n_params, state) for state in states}
        pairs = [pair for i, flags in known.items() for pair in zip(flags, zero[i], strict=True)]
        if all((a == b).all() for a, b in pairs):
            return constraints, axes


def _zero_after(
    program: Program, axes: tuple[AxisInfo, ...], n_params: int, state: StateLeaf
) -> tuple[np.ndarray, ...]:
    """Where a state is zero when masked, after a call too."""
    before = axes[program.inputs[n_params + state.input]]
    if state.output is None:
        return before.zero
    after = axes[program.outputs[state.output]]
    return tuple(
        a & (b | after.is_zero) if len(a) == len(b) else np.zeros(len(a), bool)
        for a, b in zip(before.zero, after.zero, strict=True)
    )


def _coupled(
    program: Program,
    n_params: int,
    updated: dict[int, int],
    names: Sequence[str],
    states: Sequence[StateLeaf],
    zero: dict[int, tuple[np.ndarray, ...]],
) -> tuple[Constraints, tuple[AxisInfo, ...]]:
    """Likewise, given where states are zero; everywhere by default."""
    constraints = Constraints()
    constraints.is_symbolic = any(is_symbolic(program.avals[i].shape) for i in program.inputs)
    shapes = [sized(tuple(program.avals[number].shape)) for number in program.inputs]
    ins = [fresh_axes(constraints, shape, zero=True) for shape in shapes[:n_params]]
    ins += [input_axes(constraints, *item) for item in zip(shapes[n_params:], names, strict=True)]
    for state in states:
        position = n_params + state.input
        free = fresh_axes(constraints, shapes[position], zero=True)
        ins[position] = AxisInfo(free.ids, zero.get(state.input, free.zero))
    walk(program, ins, constraints)
    found = constraints.values
    twins = {state.output: n_params + state.input for state in states} | updated
    for position, number in enumerate(program.outputs):
        twin = twins.get(position)
        for axis, ids in enumerate(found[number].ids):
            other = None if twin is None else ins[twin].ids[axis]
            if other is not None and len(other) == len(ids):
                constraints.equate(ids, other)
                continue
            constraints.freeze(ids, f"reaches output {position}")
            if other is not None:
                constraints.freeze(other, f"a state that grows, at output {position}")
    unused = AxisInfo((), ())
    return constraints, tuple(found.get(i, unused) for i in range(len(program.avals)))


def walk(program: Program, ins: list[AxisInfo], constraints: Constraints) -> None:
    """Puts the axes of every value of a program, given those of its inputs, into `constraints.values`."""
    found = constraints.values
    found.update(zip(program.inputs, ins, strict=True))
    for number, value in program.constants.items():
        known = fresh_axes(constraints, tuple(np.shape(value)), zero=False)
        found[number] = AxisInfo(known.ids, known.zero, _number(value))
    for operation in program.operations:
        operands = [found[i] for i in operation.ins]
        shapes = [tuple(program.avals[i].shape) for i in operation.outs]
        params = operation.params
        if constraints.is_symbolic:
            shapes, params = [sized(shape) for shape in shapes], sized(params)
        nested, rule = nested_rule(operation), RULES.get(operation.name)
        if nested is not None:
            outs = nested(walk, constraints, operation, operands, shapes)
        elif rule is not None:
            outs = rule(constraints, params, operation.source, operands, shapes)
        else:
            outs = no_rule(constraints, params, operation.source, operands, shapes, operation.name)
        found.update(zip(operation.outs, outs, strict=True))


def _number(value: Any) -> float | None:
    if np.shape(value) or not np.issubdtype(np.asarray(value).dtype, np.number):
        return None
    return float(np.real(np.asarray(value)))


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
