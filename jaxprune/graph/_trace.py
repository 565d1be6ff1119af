"""The coupling graph of a function: which axes of which parameters shrink together, and which cannot."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params
from jaxprune.graph._axes import Axes, fresh_axes, frozen_axes, no_rule
from jaxprune.graph._cost import Cost, cost_of
from jaxprune.graph._couple import RULES
from jaxprune.graph._nested import RULES as NESTED
from jaxprune.graph._program import Program, trace_program
from jaxprune.graph._removal import Removal, dead_slices, removal_of
from jaxprune.graph._units import Facts, Units
from jaxprune.graph._vanish import Work, gone_leaves, needed_work


@dataclass(frozen=True)
class Group:
    """Units that live on the same axes: the channels of some layers, the heads of an attention.

    Attributes:
      name: the member that makes them, as `path[axis]`.
      size: number of units.
      members: every `(path, axis)` that shrinks with them.
      units: numbers of the units.
      kind: `"units"`, or `"layers"` where each is one turn of a scan over stacked layers.
    """

    name: str
    size: int
    members: tuple[tuple[str, int], ...]
    units: np.ndarray
    kind: str = "units"


@dataclass(frozen=True)
class Graph:
    """A traced function; made by `jp.trace`.

    Attributes:
      paths: path of each leaf of the parameters, in flatten order.
      shapes: shape of each leaf.
      treedef: structure of the parameters.
      groups: what can shrink.
      frozen: `((path, axis), reason)` for what cannot.
      program: the operations.
      axes: ids of each value of the program.
      units: the solved facts.
      bodies: programs within operations, and their axes, by place.
      updated: which outputs are updated copies of which leaves, by position.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    treedef: Any
    groups: tuple[Group, ...]
    frozen: tuple[tuple[tuple[str, int], str], ...]
    program: Program
    axes: tuple[Axes, ...]
    units: Units
    bodies: dict[tuple[int, ...], Any]
    updated: dict[int, int]

    def cost(self, masks: Masks | None = None) -> Cost:
        """What a call costs: FLOPs, multiply-adds and bytes, per operation and in total.

        Args:
          masks: tree of bools like the parameters: the cost once the units that they mask are removed.
            Nothing is by default.
        """
        if masks is None:
            return self.cost_without(None)
        removal = self.removal(masks)
        work = needed_without(self, removal.blank)[0] if removal.blank else None
        return self.cost_without(removal.ids, work)

    def cost_without(self, removed: np.ndarray | None, work: Work | None = None) -> Cost:
        """What a call costs without some ids, and of some of its operations."""
        program = self.program
        if work is not None:
            program = dataclasses.replace(program, operations=work.operations)
        return cost_of(program, self.axes, len(self.paths), removed, self.bodies)

    def removal(self, masks: Masks) -> Removal:
        """The units that masks remove."""
        _checks.same_structure(
            "masks", masks, "the traced params", self.treedef.unflatten(self.paths)
        )
        flags = self.treedef.flatten_up_to(masks)
        return removal_of(self.units, self.own, *dead_slices(self.shapes, flags))

    @property
    def own(self) -> list[Axes]:
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
    **kwargs: Any,
) -> Graph:
    """Traces `fn(params, *args, **kwargs)` and finds what must shrink together.

    The function runs abstractly, once; nothing is computed. Arguments may be `jax.ShapeDtypeStruct`.

    Args:
      fn: any traceable function of parameters and inputs: a linen `apply`, a function of an `nnx.State`,
        plain JAX code.
      params: its parameters, any tree of arrays.
      *args: example inputs, of any batch size.
      updates: names the part of the output that is an updated copy of parameters, such as Flax's mutable
        collections: `lambda out: out[1]`. Those axes shrink with the parameters; all others of the
        output are frozen.
      **kwargs: further inputs.

    Returns:
      A `Graph`.

    Raises:
      TypeError: inputs that `fn` needs are missing.
      ValueError: `fn` cannot be traced, for instance because it branches on the value of an array (the
        error names the line), or `updates` names leaves that are no parameters. What `fn` itself raises
        is passed on.

    Example:
      >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
      >>> graph = jp.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 4)))
      >>> [(group.size, group.members) for group in graph.groups]
      [(8, (('a', 1), ('b', 0)))]
    """
    paths, leaves, treedef = _trees.flatten(params)
    program = trace_program(fn, params, *args, **kwargs)
    facts = Facts()
    updated = updated_leaves(program, paths, updates)
    axes = couple(program, len(leaves), facts, updated)
    units = facts.solve()
    numbers = program.inputs[: len(leaves)]
    shapes = tuple(tuple(np.shape(leaf)) for leaf in leaves)
    turns = np.unique(units.label[np.concatenate([*facts.turns, np.zeros(0, np.int64)])])
    groups, frozen = _groups(paths, [axes[i] for i in numbers], units, set(turns.tolist()))
    bodies = facts.bodies
    return Graph(
        tuple(paths), shapes, treedef, groups, frozen, program, axes, units, bodies, updated
    )


def couple(
    program: Program, n_params: int, facts: Facts, updated: dict[int, int]
) -> tuple[Axes, ...]:
    """The axes of every value of a program.

    Args:
      program: the program.
      n_params: how many of its first inputs are parameters.
      facts: where facts are put.
      updated: which outputs are updated copies of which parameters, by position.
    """
    shapes = [tuple(program.avals[number].shape) for number in program.inputs]
    ins = [
        fresh_axes(facts, shape, zero=True) if position < n_params else frozen_axes(shape)
        for position, shape in enumerate(shapes)
    ]
    found = walk(program, ins, facts)
    for position, number in enumerate(program.outputs):
        twin = updated.get(position)
        for axis, ids in enumerate(found[number].ids):
            if twin is None:
                facts.freeze(ids, f"reaches output {position}")
            else:
                facts.equate(ids, ins[twin].ids[axis])
    return found


def walk(program: Program, ins: list[Axes], facts: Facts) -> tuple[Axes, ...]:
    """The axes of every value of a program, given those of its inputs."""
    found = dict(zip(program.inputs, ins, strict=True))
    for number, value in program.constants.items():
        known = fresh_axes(facts, tuple(np.shape(value)), zero=False)
        found[number] = Axes(known.ids, known.zero, _number(value))
    around = facts.place
    for operation in program.operations:
        operands = [found[i] for i in operation.ins]
        shapes = [tuple(program.avals[i].shape) for i in operation.outs]
        name = operation.primitive.name
        facts.place = (*around, *operation.outs[:1])
        if name in _RULES:
            outs = _RULES[name](facts, operation.params, operation.source, operands, shapes)
        else:
            outs = no_rule(facts, operation.params, operation.source, operands, shapes, name)
        found.update(zip(operation.outs, outs, strict=True))
    facts.place = around
    unused = Axes((), ())
    return tuple(found.get(i, unused) for i in range(len(program.avals)))


_RULES = {**RULES, **{name: rule(walk) for name, rule in NESTED.items()}}


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


def _groups(
    paths: list[str], params: list[Axes], units: Units, turns: set[int]
) -> tuple[tuple[Group, ...], tuple[tuple[tuple[str, int], str], ...]]:
    members: dict[int, list[tuple[str, int]]] = {}
    frozen = []
    for path, axes in zip(paths, params, strict=True):
        for axis, ids in enumerate(axes.ids):
            parts = np.unique(units.label[ids])
            stuck = units.why[parts] >= 0
            if len(parts) and stuck.all():
                reason = "it has one entry" if len(ids) == 1 else units.reasons[units.why[parts[0]]]
                frozen.append(((path, axis), reason))
            found = np.unique(units.factors(parts[~stuck])[1])
            for unit in found[units.why[found] < 0].tolist():
                members.setdefault(unit, []).append((path, axis))
    alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for unit, entry in members.items():
        alike.setdefault(tuple(dict.fromkeys(entry)), []).append(unit)
    # rows and columns of one product live on the same axes: heads and head dimensions
    columns = set(units.column[units.column >= 0].tolist())
    rank = {path: len(axes.ids) for path, axes in zip(paths, params, strict=True)}
    groups = []
    for entry, found in alike.items():
        inner = [unit for unit in found if unit in columns]
        outer = [unit for unit in found if unit not in columns]
        for part, suffix in ((outer, " (outer)"), (inner, " (inner)")):
            if part:
                kind = "layers" if turns.issuperset(part) else "units"
                name = _name(entry, rank) + (suffix if inner and outer else "")
                groups.append(Group(name, len(part), entry, np.array(part), kind))
    return tuple(groups), tuple(frozen)


def _name(members: tuple[tuple[str, int], ...], rank: dict[str, int]) -> str:
    """A matrix that makes the units, if there is one, else any, else the first member."""
    matrices = [(path, axis) for path, axis in members if rank[path] > 1]
    makers = [(path, axis) for path, axis in matrices if axis == rank[path] - 1]
    path, axis = (makers or matrices or list(members))[0]
    return f"{path}[{axis}]"


def needed_without(graph: Graph, blank: tuple[int, ...]) -> tuple[Work, set[int]]:
    """The work that is left when some leaves are zero, and the inputs that are gone with them."""
    program, n_params = graph.program, len(graph.paths)
    ins = [graph.axes[i] for i in program.inputs]
    for position in blank:
        ins[position] = Axes(ins[position].ids, ins[position].zero, 0.0)
    work = needed_work(program, walk(program, ins, Facts()))
    numbers = [program.inputs[position] for position in blank]
    return work, set(gone_leaves(program, work, numbers, n_params))
