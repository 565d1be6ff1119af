"""Gates added to any function, at groups of units that `jp.trace` found."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import Params
from jaxprune.gates._layers import METHODS, gate_logits, gate_params, kept, opened
from jaxprune.graph import Graph, Group, Operation, inputs_of, observe, run_operation, trace

_PRODUCTS = ("dot_general", "conv_general_dilated")


class _Reader(NamedTuple):
    """Where a product reads channels of a group.

    Attributes: side: which operand is the activations; batch, axis: their axes of examples and channels;
      unit: the unit of each channel, counted within the group; -1 of others.
    """

    side: int
    batch: int
    axis: int
    unit: np.ndarray


class GatedFunction:
    """A function with gates, from `jp.gates.attach`.

    Attributes:
      names: of the gated groups.
      sizes: gates of each.
    """

    def __init__(
        self, graph: Graph, groups: Sequence[Group], readers: list[dict[int, _Reader]], how: Any
    ) -> None:
        """Made by `attach`."""
        self._graph, self._readers, self._how = graph, readers, how
        self.names = tuple(group.name for group in groups)
        self.sizes = tuple(group.size for group in groups)

    def init(self, key: jax.Array) -> Any:
        """Parameters of the gates, by group, all open at first."""
        keys = jax.random.split(key, max(len(self.names), 1))
        found = {}
        for name, size, reads, own in zip(
            self.names, self.sizes, self._readers, keys, strict=False
        ):
            width = len(next(iter(reads.values())).unit)
            found[name] = gate_params(own, width, size, reduction=self._how["reduction"])
        return found

    def __call__(
        self,
        params: Params,
        gate_params: Any,
        *args: Any,
        key: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Outputs of the function with gates, and the gates, (batch, units) by group.

        `key`: for gates that draw in training; none for inference.
        """
        graph = self._graph.for_inputs(params, *args, **kwargs)
        program, inputs = graph.program, inputs_of(args, kwargs)
        keys = [None] * len(self.names) if key is None else jax.random.split(key, len(self.names))
        gates: dict[str, jax.Array] = {}
        wanted: dict[int, list[int]] = {}
        for number, reads in enumerate(self._readers):
            for place in reads:
                wanted.setdefault(place, []).append(number)
        places = {id(op): i for i, op in enumerate(program.operations)}

        def hook(operation: Operation, operands: list[Any], outs: list[Any]) -> list[Any]:
            groups = wanted.get(places[id(operation)], [])
            if not groups:
                return outs
            operands = list(operands)
            for number in groups:
                reader, name = self._readers[number][places[id(operation)]], self.names[number]
                x = jnp.moveaxis(operands[reader.side], (reader.batch, reader.axis), (0, -1))
                if name not in gates:
                    logits = gate_logits(gate_params[name], x)
                    gates[name] = opened(
                        logits,
                        self._how["method"],
                        k=kept(self._how["k"], self.sizes[number]),
                        key=keys[number],
                        temperature=self._how["temperature"],
                    )
                own = jnp.where(reader.unit >= 0, gates[name][:, np.maximum(reader.unit, 0)], 1.0)
                own = own.reshape(own.shape[0], *(1 for _ in x.shape[1:-1]), -1).astype(x.dtype)
                operands[reader.side] = jnp.moveaxis(x * own, (0, -1), (reader.batch, reader.axis))
            return run_operation(operation, operands)

        leaves = [_trees.dense(leaf) for leaf in _trees.flatten(params)[1]]
        outs = observe(program, [*leaves, *inputs.arrays], hook)
        return program.out_tree.unflatten(outs), gates


def attach(
    fn: Callable[..., Any],
    params: Params,
    *args: Any,
    groups: Sequence[str] | None = None,
    method: str = "top_k",
    k: int | float = 0.5,
    reduction: int = 16,
    temperature: Any = 1.0,
    **kwargs: Any,
) -> GatedFunction:
    """Adds channel gates to an existing function, without editing it.

    Each gated group of units (channels, neurons, heads) gets a small network that reads what the units
    feed, and decides for each example which of them count. Products that read the group see the others
    as 0.

    Args:
      fn: `fn(params, *args, **kwargs)`; examples lie along the first axis of activations.
      params: any tree of arrays.
      *args, **kwargs: example inputs; only shapes matter.
      groups: names of groups of `jp.trace(fn, params, *args).groups`; by default all that a product of
        the top level reads.
      method, k, temperature: see `jp.gates.opened`.
      reduction: of the bottleneck.

    Returns:
      A `GatedFunction`: `gate_params = gated.init(key)`, and
      `outputs, gates = gated(params, gate_params, *args, key=key)`.

    Raises:
      ValueError: a group that does not exist, or one that no product reads; a gate on a frozen axis
        (with the reason).

    Example:
      >>> fn = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
      >>> params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> gated = jp.gates.attach(fn, params, jnp.ones((3, 4)), k=2)
      >>> out, gates = gated(params, gated.init(jax.random.key(0)), jnp.ones((3, 4)))
      >>> out.shape, {name: g.shape for name, g in gates.items()}
      ((3, 2), {'w1[1]': (3, 8)})

    Reference: Gao et al., "Dynamic Channel Pruning", 2018, https://arxiv.org/abs/1810.05331
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    graph = trace(fn, params, *args, **kwargs)
    known = {group.name: group for group in graph.groups if group.kind == "units"}
    chosen = list(known.values())
    if groups is not None:
        chosen = [_group(name, known, graph) for name in groups]
    readers = [_readers(graph, group) for group in chosen]
    if groups is None:
        pairs = [(g, r) for g, r in zip(chosen, readers, strict=True) if r]
        chosen, readers = [g for g, _ in pairs], [r for _, r in pairs]
    for group, reads in zip(chosen, readers, strict=True):
        if not reads:
            raise ValueError(
                f"groups: no product of the top level reads {group.name!r}; gate it inside of its loop"
            )
        kept(k, group.size)
    how = {"method": method, "k": k, "reduction": reduction, "temperature": temperature}
    return GatedFunction(graph, chosen, readers, how)


def _group(name: str, known: dict[str, Group], graph: Graph) -> Group:
    if name in known:
        return known[name]
    frozen = {f"{path}[{axis}]": reason for (path, axis), reason in graph.frozen}
    if name in frozen:
        raise ValueError(f"groups: {name!r} cannot be gated: {frozen[name]}")
    raise ValueError(_trees.no_match(name, [*known], parameter="groups"))


def _readers(graph: Graph, group: Group) -> dict[int, _Reader]:
    """The products that sum over units of a group, by number of the operation."""
    order = np.full(len(graph.units.why), -1)
    order[group.units] = np.arange(group.size)
    leaves = set(graph.program.inputs[: len(graph.paths)])
    made = _made_of_leaves(graph, leaves)
    found = {}
    for place, operation in enumerate(graph.program.operations):
        if operation.primitive.name not in _PRODUCTS:
            continue
        sides = [i for i in (0, 1) if operation.ins[i] not in made]
        for side in sides:
            if len(sides) == 1:
                reader = _reader(graph, operation, side, order)
                if reader is not None:
                    found[place] = reader
    return found


def _made_of_leaves(graph: Graph, leaves: set[int]) -> set[int]:
    """Values that follow from parameters and constants alone."""
    made = set(leaves) | set(graph.program.constants)
    for operation in graph.program.operations:
        if all(i in made for i in operation.ins):
            made |= set(operation.outs)
    return made


def _reader(graph: Graph, operation: Operation, side: int, order: np.ndarray) -> _Reader | None:
    axes = graph.axes[operation.ins[side]]
    if operation.primitive.name == "conv_general_dilated":
        numbers = operation.params["dimension_numbers"]
        if side != 0:
            return None
        batch, summed = numbers.lhs_spec[0], [numbers.lhs_spec[1]]
    else:
        contract, batches = operation.params["dimension_numbers"]
        summed = list(contract[side])
        batch = batches[side][0] if batches[side] else 0
    for axis in summed:
        if axis == batch:
            continue
        # heads times dims are two units at one place: the group's is meant
        place, unit = graph.units.factors(graph.units.label[axes.ids[axis]])
        mine = np.full(len(axes.ids[axis]), -1)
        own = order[unit] >= 0
        mine[place[own]] = order[unit[own]]
        if (mine >= 0).any():
            return _Reader(side, batch, axis, mine)
    return None
