"""Gates added to any function, at groups of units that `jp.trace` found."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import Params
from jaxprune.gates._layers import METHODS, gate_logits, gate_params, kept, opened
from jaxprune.gates._skip import open_channels
from jaxprune.graph import Graph, Group, trace
from jaxprune.program import (
    Executor,
    HookResult,
    Operation,
    Step,
    inputs_of,
    is_product,
    run_operation,
)


class _Reader(NamedTuple):
    """Where a product reads channels of a group.

    Attributes:
      side: which operand is the activations.
      batch, axis: their axes of examples and channels.
      twin: axis of the other operand that is summed over with the channels.
      unit: the unit of each channel, counted within the group; -1 of others.
      macs: multiply-adds for one example.
      examples: in the traced batch.
    """

    side: int
    batch: int
    axis: int
    twin: int
    unit: np.ndarray
    macs: float
    examples: int

    def slices(self, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Channels that no gate decides, and (units, channels of each); None if units differ in size."""
        counts = np.bincount(self.unit[self.unit >= 0], minlength=size)
        if (counts != counts[0]).any():
            return None
        own = np.argsort(self.unit, kind="stable")[int((self.unit < 0).sum()) :]
        return np.flatnonzero(self.unit < 0), own.reshape(size, -1)


Close = Callable[[int, jax.Array, _Reader, list[Any]], list[Any]]
"""`(number of the group, its gates, reader, operands) -> operands`, those of closed units without
effect.
"""


class GatedFunction:
    """A function with gates, from `jp.gates.attach`.

    Attributes:
      graph: of the function.
      names: of the gated groups.
      sizes: gates of each.
      costs: multiply-adds for one example of the products that read each group, all gates open.
    """

    def __init__(
        self, graph: Graph, groups: Sequence[Group], readers: list[dict[int, _Reader]], how: Any
    ) -> None:
        """Made by `attach`."""
        self.graph, self._readers, self._how = graph, readers, how
        self.names = tuple(group.name for group in groups)
        self.sizes = tuple(group.size for group in groups)
        self.costs = {
            name: sum(reader.macs for reader in reads.values())
            for name, reads in zip(self.names, readers, strict=True)
        }

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
        temperature: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Outputs of the function with gates, and the gates, (batch, units) by group.

        `key`: for gates that draw in training; none for inference. `temperature`: instead of the one
        given to `attach`, to anneal.
        """
        how = self._how if temperature is None else {**self._how, "temperature": temperature}
        return self._run(params, gate_params, args, kwargs, how, key, _masked)

    def skip(
        self, params: Params, gate_params: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The same for a batch of 1 and `"top_k"` gates: products read the open channels only.

        What makes the channels runs in full, since gates read what it made; the modules of `jp.linen`
        and `jp.nnx` gate by what a layer reads, and save on both sides.

        Raises:
          ValueError: gates of another method, more than one example, units of different sizes, a
            product that reads two gated groups along one axis.
        """

        def gathered(number: int, gates: Any, reader: _Reader, operands: list[Any]) -> list[Any]:
            opened, index = open_channels(gates, self._how["method"], self._how["k"])
            found = reader.slices(self.sizes[number])
            axis, twin = reader.axis, reader.twin
            width = operands[reader.side].shape[axis]
            if found is None or width != len(reader.unit):
                why = (
                    "its units have different numbers of channels"
                    if found is None
                    else "a product reads it and another gated group along one axis"
                )
                raise ValueError(
                    f"groups: {self.names[number]!r} cannot be skipped: {why}; attach without it"
                )
            always, own = found
            index = jnp.concatenate([always, jnp.asarray(own)[index].reshape(-1)])
            x, other = operands[reader.side], operands[1 - reader.side]
            scale = _per_channel(opened[None], reader)[0][index].astype(x.dtype)
            x = jnp.take(x, index, axis=axis)
            x = x * scale.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
            other = jnp.take(other, index, axis=twin)
            return [x, other] if reader.side == 0 else [other, x]

        return self._run(params, gate_params, args, kwargs, self._how, None, gathered)

    def spent(self, gates: Mapping[str, jax.Array]) -> jax.Array:
        """Multiply-adds of each example with closed units skipped, as a fraction of the ungated
        function's.

        Those of the gates themselves, two small products each, are not counted.
        """
        left: dict[int, Any] = {}  # of each gated product, per example
        macs: dict[int, float] = {}
        for name, reads in zip(self.names, self._readers, strict=True):
            for place, reader in reads.items():
                opened = _per_channel((gates[name] != 0).astype(jnp.float32), reader).mean(-1)
                left[place] = left.get(place, 1.0) * opened
                macs[place] = reader.macs
        examples = next(iter(self._readers[0].values())).examples
        whole = self.graph.cost().macs / examples
        closed = [macs[place] * (1 - rate) for place, rate in left.items()]
        return 1 - sum(closed[1:], start=closed[0]) / whole

    def _run(
        self,
        params: Params,
        gate_params: Any,
        args: Any,
        kwargs: Any,
        how: dict[str, Any],
        key: jax.Array | None,
        close: Close,
    ) -> tuple[Any, dict[str, jax.Array]]:
        keys = [None] * len(self.names) if key is None else jax.random.split(key, len(self.names))
        graph = self.graph.for_inputs(params, *args, **kwargs)
        program, inputs = graph.program, inputs_of(args, kwargs)
        gates: dict[str, jax.Array] = {}
        wanted: dict[int, list[int]] = {}
        for number, reads in enumerate(self._readers):
            for place in reads:
                wanted.setdefault(place, []).append(number)

        def hook(step: Step) -> HookResult:
            operation, operands, _ = step
            place = operation.outs[0] if operation.outs else -1
            reads = [(number, self._readers[number][place]) for number in wanted.get(place, [])]
            for number, reader in reads:
                if self.names[number] not in gates:
                    x = jnp.moveaxis(operands[reader.side], (reader.batch, reader.axis), (0, -1))
                    gates[self.names[number]] = opened(
                        gate_logits(gate_params[self.names[number]], x),
                        how["method"],
                        k=kept(how["k"], self.sizes[number]),
                        key=keys[number],
                        temperature=how["temperature"],
                    )
            for number, reader in reads:
                operands = close(number, gates[self.names[number]], reader, operands)
            return HookResult(run_operation(operation, operands) if reads else None)

        leaves = [_trees.dense(leaf) for leaf in _trees.flatten(_trees.resolve_ties(params))[1]]
        outs, _ = Executor(hook).run(program, [*leaves, *inputs.arrays])
        return program.out_tree.unflatten(outs), gates


def _per_channel(gates: jax.Array, reader: _Reader) -> jax.Array:
    """Gates of units as gates of the channels that a product reads: (batch, channels)."""
    return jnp.where(reader.unit >= 0, gates[:, np.maximum(reader.unit, 0)], 1.0)


def _masked(number: int, gates: jax.Array, reader: _Reader, operands: list[Any]) -> list[Any]:
    """Operands with closed channels at 0."""
    x = jnp.moveaxis(operands[reader.side], (reader.batch, reader.axis), (0, -1))
    own = _per_channel(gates, reader)
    own = own.reshape(own.shape[0], *(1 for _ in x.shape[1:-1]), -1).astype(x.dtype)
    operands = list(operands)
    operands[reader.side] = jnp.moveaxis(x * own, (0, -1), (reader.batch, reader.axis))
    return operands


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
    known = {group.name: group for group in graph.groups if group.kind != "layers"}
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
    if not chosen:
        raise ValueError(
            "groups: nothing to gate: no product of the top level reads units that can close; inside of "
            f"loops, branches or functions with own gradients: {', '.join(known) or 'none'}"
        )
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
    """The products that sum over units of a group, by number of their result."""
    order = np.full(len(graph.solution.reason), -1)
    order[group.units] = np.arange(group.size)
    leaves = set(graph.program.inputs[: len(graph.paths)])
    made = _made_of_leaves(graph, leaves)
    found = {}
    for operation in graph.program.operations:
        if not is_product(operation.name) or "dimension_numbers" not in operation.params:
            continue
        sides = [i for i in (0, 1) if operation.ins[i] not in made]
        for side in sides:
            if len(sides) == 1:
                reader = _reader(graph, operation, side, order)
                if reader is not None:
                    found[operation.outs[0]] = reader
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
    x, other = (graph.program.avals[operation.ins[i]].shape for i in (side, 1 - side))
    out = graph.program.avals[operation.outs[0]].shape
    if operation.name == "conv_general_dilated":
        numbers = operation.params["dimension_numbers"]
        # channels that a grouped convolution hands on are gated where they are summed
        if side != 0 or operation.params["feature_group_count"] != 1:
            return None
        batch, pairs = numbers.lhs_spec[0], [(numbers.lhs_spec[1], numbers.rhs_spec[1])]
        depth = np.prod(other) / other[numbers.rhs_spec[0]]
    else:
        contract, batches = operation.params["dimension_numbers"]
        pairs = list(zip(contract[side], contract[1 - side], strict=True))
        batch = batches[side][0] if batches[side] else 0
        depth = np.prod([x[axis] for axis, _ in pairs])
    for axis, twin in pairs:
        if axis == batch:
            continue
        # heads times dims are two units at one place: the group's is meant
        place, unit = graph.solution.factors(graph.solution.label[axes.ids[axis]])
        mine = np.full(len(axes.ids[axis]), -1)
        own = order[unit] >= 0
        mine[place[own]] = order[unit[own]]
        if (mine >= 0).any():
            macs = float(np.prod(out) * depth / x[batch])
            return _Reader(side, batch, axis, twin, mine, macs, x[batch])
    return None
