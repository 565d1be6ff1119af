"""What removed units contributed, moved into the biases behind them.

A unit that goes takes its contribution to every sum along. Where that contribution is the same for all
inputs, or nearly so, its mean over the examples is added to the next parameter that is added to (or
subtracted from) that sum.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph import Graph, Removal
from jaxprune.program import Operation, observe, run_operation

FOLDS = ("constants", "mean")
_PRODUCTS = ("dot_general", "conv_general_dilated")
_THROUGH = (
    "reshape",
    "transpose",
    "convert_element_type",
    "squeeze",
    "expand_dims",
    "name",
    "copy",
)


def folded(
    graph: Graph, removal: Removal, leaves: list[Any], masks: list[Any], inputs: list[Any], how: str
) -> tuple[list[Any], list[Any]]:
    """Parameters with what removed units contributed, and what the outputs should be.

    Args:
      graph: of the function.
      removal: what goes.
      leaves: the parameters, in flatten order.
      masks: likewise.
      inputs: the other arguments, flat.
      how: one of `FOLDS`.
    """
    fold = _Fold(graph, removal, how)

    @jax.jit
    def run(leaves: list[Any], inputs: list[Any]) -> tuple[dict[int, Any], list[Any]]:
        fold.start(leaves, masks, inputs)
        outs = observe(graph.program, [*fold.leaves, *inputs], fold.hook)
        return fold.deltas, outs

    deltas, outs = run(leaves, inputs)
    if fold.skipped:
        warnings.warn(
            "fold: no bias follows, so what removed units contribute is dropped, at "
            + ", ".join(dict.fromkeys(fold.skipped)),
            stacklevel=3,
        )
    added = [x if i not in deltas else x + deltas[i].astype(x.dtype) for i, x in enumerate(leaves)]
    return added, outs


class _Fold:
    """The pass over a program that collects contributions."""

    def __init__(self, graph: Graph, removal: Removal, how: str) -> None:
        self.graph, self.removal, self.how = graph, removal, how
        program = graph.program
        self.users: dict[int, list[Operation]] = {}
        self.maker: dict[int, Operation] = {}
        self.data = set(program.inputs[len(graph.paths) :])
        for operation in program.operations:
            for i in set(operation.ins):
                self.users.setdefault(i, []).append(operation)
            if self.data.intersection(operation.ins):
                self.data.update(operation.outs)
            self.maker.update(dict.fromkeys(operation.outs, operation))
        self.skipped: list[str] = []

    def start(self, leaves: list[Any], masks: list[Any], inputs: list[Any]) -> None:
        """Forgets the last run. Entries of units that go are needed once more; others stay masked."""
        self.deltas: dict[int, Any] = {}
        self.skipped.clear()
        self.leaves = []
        for x, mask, axes in zip(leaves, masks, self.graph.own, strict=True):
            keep = jnp.asarray(mask)
            for axis, ids in enumerate(axes.ids):
                flags = self.removal.ids[ids]
                if flags.any():
                    keep = keep | flags.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
            self.leaves.append(x if keep.ndim == 0 else jnp.where(keep, x, jnp.zeros((), x.dtype)))
        self.values: dict[int, Any] = dict(
            zip(self.graph.program.inputs, self.leaves, strict=False)
        )

    def hook(self, operation: Operation, operands: list[Any]) -> list[Any]:
        """Runs an operation, cuts what reaches removed units, folds what they contribute."""
        outs = run_operation(operation, operands)
        if not self.data.intersection(operation.outs):
            self.values.update(zip(operation.outs, outs, strict=True))
        if operation.primitive.name not in _PRODUCTS:
            return outs
        kinds = [i in self.data for i in operation.ins[:2]]
        if kinds.count(True) != 1:
            return outs
        side = kinds.index(True)
        contracted, free = _axes_of(self.graph, operation, side)
        contribution = self._contribution(operation, operands, side, contracted)
        if contribution is not None:
            self._fold(operation, contribution, outs[0], free)
        if self.how == "constants":
            out = outs[0]
            for axis in free:
                flags = self._flags(operation.outs[0], axis)
                if flags.any():
                    out = jnp.where(_along(flags, axis, out.ndim), jnp.zeros((), out.dtype), out)
            outs = [out]
        return outs

    def _flags(self, number: int, axis: int) -> np.ndarray:
        return self.removal.ids[self.graph.axes[number].ids[axis]]

    def _contribution(
        self, operation: Operation, operands: list[Any], side: int, contracted: tuple[int, ...]
    ) -> Any:
        """What the removed indices of the contracted axes add to the result, or None."""
        x = operands[side]
        gone: Any = None
        for axis in contracted:
            flags = self._flags(operation.ins[side], axis)
            if flags.any():
                here = _along(flags, axis, x.ndim)
                gone = here if gone is None else gone | here
        if gone is None:
            return None
        changed = list(operands)
        changed[side] = jnp.where(gone, x, jnp.zeros((), x.dtype))
        return run_operation(operation, changed)[0]

    def _fold(
        self, operation: Operation, contribution: Any, result: Any, free: tuple[int, ...]
    ) -> None:
        """Adds the mean of a contribution to the next bias, through operations that pass it on.

        Places where the sum itself is large count less, by its squared norm: a few outliers, such as the
        separator token of a transformer, would otherwise move all other places.
        """
        others = tuple(i for i in range(contribution.ndim) if i not in free)
        sizes = jnp.sum(jnp.square(result.astype(jnp.float32)), free, keepdims=True)
        weights = 1 / (sizes + jnp.mean(sizes) * 1e-3 + 1e-30)
        weighted = jnp.sum(contribution.astype(jnp.float32) * weights, others, keepdims=True)
        mean = weighted / jnp.sum(
            jnp.broadcast_to(weights, contribution.shape), others, keepdims=True
        )
        value = jnp.broadcast_to(mean, contribution.shape)
        number = operation.outs[0]
        while True:
            users = self.users.get(number, [])
            if len(users) != 1:
                break
            (user,) = users
            name = user.primitive.name
            if name in ("add", "sub", "mul", "div") and len(user.ins) == 2:
                other = user.ins[1] if user.ins[0] == number else user.ins[0]
                same_rank = len(self.graph.axes[other].ids) in (0, value.ndim)
                if other in self.data or other == number or not same_rank:
                    break
                if name in ("add", "sub"):
                    chain = self._chain(other)
                    flip = name == "sub"
                    if flip and user.ins[0] != number:
                        break
                    if chain is not None:
                        self._add(*chain, -value if flip else value)
                        return
                else:
                    factor = self._known(other)
                    if factor is None or (name == "div" and user.ins[0] != number):
                        break
                    value = value * factor if name == "mul" else value / factor
            elif name in _THROUGH:
                if name != "convert_element_type":
                    value = run_operation(user, [value])[0]
            else:
                break
            number = user.outs[0]
        self.skipped.append(operation.source or operation.primitive.name)

    def _known(self, number: int) -> Any:
        if number in self.graph.program.constants:
            return self.graph.program.constants[number]
        return self.values.get(number)

    def _chain(self, number: int) -> tuple[int, list[Operation]] | None:
        """The leaf that a value is a view of, and the operations between, last first."""
        inputs = self.graph.program.inputs[: len(self.graph.paths)]
        steps: list[Operation] = []
        while number not in inputs:
            maker = self.maker.get(number)
            if maker is None or maker.primitive.name not in (*_THROUGH, "broadcast_in_dim"):
                return None
            steps.append(maker)
            number = maker.ins[0]
        return inputs.index(number), steps

    def _add(self, position: int, steps: list[Operation], value: Any) -> None:
        """Adds to a leaf what makes its view larger by `value`, which is constant where it broadcasts."""

        def view(x: Any) -> Any:
            for step in reversed(steps):
                if step.primitive.name != "convert_element_type":
                    x = run_operation(step, [x])[0]
            return x

        like = jnp.zeros(self.graph.shapes[position], jnp.float32)
        out, back = jax.vjp(view, like)
        stretched = tuple(i for i, n in enumerate(out.shape) if n < value.shape[i])
        mean = jnp.mean(value, stretched, keepdims=True)
        delta = back(mean)[0] / back(jnp.ones_like(out))[0]
        self.deltas[position] = self.deltas.get(position, 0.0) + delta


def _along(flags: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return flags.reshape([-1 if i == axis else 1 for i in range(rank)])


def _axes_of(
    graph: Graph, operation: Operation, side: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The summed axes of the data operand, and the axes of the result that the parameter has too."""
    numbers = operation.params["dimension_numbers"]
    if operation.primitive.name == "conv_general_dilated":
        spec = (numbers.lhs_spec, numbers.rhs_spec)[side]
        return (spec[1],), (numbers.out_spec[1],)
    contracting, batch = numbers
    ranks = [len(graph.program.avals[i].shape) for i in operation.ins]
    shared = len(batch[0])
    own = [rank - len(c) - shared for rank, c in zip(ranks, contracting, strict=True)]
    start = shared + (own[0] if side == 0 else 0)
    return contracting[side], (*range(shared), *range(start, start + own[1 - side]))
