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
from jaxprune.program import (
    Executor,
    Flow,
    HookResult,
    Operation,
    Step,
    is_identity,
    is_product,
    is_view,
    primitive,
    run_operation,
    same_numbers,
)

FOLDS = ("constants", "mean")


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
    def run(leaves: list[Any], inputs: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        fold.skipped.clear()
        whole = [
            _with_removed(*item, removal) for item in zip(leaves, masks, graph.own, strict=True)
        ]
        outs, deltas = fold.executor().run(graph.program, [*whole, *inputs])
        return deltas, outs

    deltas, outs = run(leaves, inputs)
    if fold.skipped:
        warnings.warn(
            "fold: what removed units contribute is dropped at "
            + "; ".join(f"{name} ({reason})" for name, reason in fold.skipped.items()),
            stacklevel=3,
        )
    changes = [deltas.get(path) for path in graph.paths]
    added = [
        x if d is None else x + d.astype(x.dtype) for x, d in zip(leaves, changes, strict=True)
    ]
    return added, outs


def _with_removed(x: Any, mask: Any, axes: Any, removal: Removal) -> Any:
    """A leaf with the entries of units that go, which are needed once more; others stay masked."""
    keep = jnp.asarray(mask)
    for axis, ids in enumerate(axes.ids):
        flags = removal.ids[ids]
        if flags.any():
            keep = keep | _along(flags, axis, x.ndim)
    return x if keep.ndim == 0 else jnp.where(keep, x, jnp.zeros((), x.dtype))


class _Fold:
    """The pass over a program that collects contributions, by path of the leaf that takes them."""

    def __init__(self, graph: Graph, removal: Removal, how: str) -> None:
        self.graph, self.removal, self.how = graph, removal, how
        self.flow = Flow(graph.program, len(graph.paths))
        self.skipped: dict[str, str] = {}
        self.read_by_scans: set[str] = set()

    def executor(self) -> Executor:
        """Runs the program and adds up contributions, those of inner programs too."""

        def merge(name: str, records: list[Any], stacked: bool) -> Any:
            if stacked:  # one bias for all iterations takes their mean
                return records[0].mean(0) if name in self.read_by_scans else records[0]
            return sum(records[1:], start=records[0])

        def lost(name: str, operation: Operation) -> None:
            self.skipped[repr(name)] = f"inside of {operation.name} at {operation.source}"

        return Executor(self.hook, enters=lambda operation: True, merge=merge, lost=lost)

    def hook(self, step: Step) -> HookResult:
        """Runs a product, cuts what reaches removed units, folds what they contribute."""
        operation, operands, _ = step
        if not is_product(operation.name) or "dimension_numbers" not in operation.params:
            return HookResult()
        kinds = [i in self.flow.data for i in operation.ins[:2]]
        if kinds.count(True) != 1:
            return HookResult()
        side = kinds.index(True)
        contracted, free = _axes_of(self.graph, operation, side)
        (out,) = run_operation(operation, operands)
        contribution = self._contribution(operation, operands, side, contracted)
        record = None
        if contribution is not None:
            record = self._fold(step, side, _weighted_mean(contribution, out, free))
        if self.how == "constants":
            for axis in free:
                flags = self._flags(operation.outs[0], axis)
                if flags.any():
                    out = jnp.where(_along(flags, axis, out.ndim), jnp.zeros((), out.dtype), out)
        return HookResult([out], record)

    def _flags(self, number: int, axis: int) -> np.ndarray:
        return self.removal.ids[self.graph.axes[number].ids[axis]]

    def _contribution(
        self, operation: Operation, operands: list[Any], side: int, contracted: tuple[int, ...]
    ) -> Any:
        """What the removed indices of the contracted axes add to the result, or None."""
        x = operands[side]
        removed: Any = None
        for axis in contracted:
            flags = self._flags(operation.ins[side], axis)
            if flags.any():
                here = _along(flags, axis, x.ndim)
                removed = here if removed is None else removed | here
        if removed is None:
            return None
        changed = list(operands)
        changed[side] = jnp.where(removed, x, jnp.zeros((), x.dtype))
        return run_operation(operation, changed)[0]

    def _fold(self, step: Step, side: int, value: Any) -> dict[str, Any] | None:
        """The next bias and what it takes of a contribution, through operations that pass it on."""
        number, reason = step.operation.outs[0], "no bias follows"
        while len(users := self.flow.users.get(number, [])) == 1:
            (user,) = users
            if primitive(user.name).neutral is not None:
                other = user.ins[1] if user.ins[0] == number else user.ins[0]
                same_rank = len(self.graph.axes[other].ids) in (0, value.ndim)
                first = user.ins[0] == number
                if other in self.flow.data or other == number or not same_rank:
                    break
                if primitive(user.name).neutral == 0:
                    found = self._bias(other) if first or user.name == "add" else None
                    if isinstance(found, tuple):
                        return self._delta(*found, -value if user.name == "sub" else value)
                    reason = found or reason
                elif not first and user.name == "div":
                    break
                else:
                    factor = self._known(other, step)
                    value = value * factor if user.name == "mul" else value / factor
            elif not same_numbers(user, views=True):
                break
            elif is_view(user.name):
                value = run_operation(user, [value])[0]
            number = user.outs[user.ins.index(number)] if is_identity(user.name) else user.outs[0]
        weight = self.flow.leaf(step.operation.ins[1 - side])
        name = repr(self.graph.paths[weight]) if weight is not None else step.operation.name
        self.skipped[f"{name} at {step.operation.source}"] = reason
        return None

    def _known(self, number: int, step: Step) -> Any:
        """A value that follows from parameters alone, perhaps of an operation that is yet to run."""
        if number in step.values:
            return step.values[number]
        if number in self.flow.constants:
            return self.flow.constants[number]
        maker = self.flow.makers[number]
        operands = [self._known(i, step) for i in maker.ins]
        return run_operation(maker, operands)[maker.outs.index(number)]

    def _bias(self, number: int) -> tuple[int, str, list[Operation]] | str | None:
        """A value that is a view of a leaf which nothing else reads: the number of the leaf, or of what
        an inner program gets of it, its path, and the views between, last first; else the reason, if any.
        """
        leaf = self.flow.leaf(number)
        if leaf is None:
            return None
        path, links = self.graph.paths[leaf], set()
        if len(self.flow.readers(self.graph.program.inputs[leaf])) != 1:
            return f"{path!r} is read elsewhere too"
        steps: list[Operation] = []
        while (maker := self.flow.makers.get(number)) is not None and not maker.is_link:
            steps.append(maker)
            number = (
                maker.ins[maker.outs.index(number)] if is_identity(maker.name) else maker.ins[0]
            )
        entry = number
        while (maker := self.flow.makers.get(number)) is not None:
            if not is_identity(maker.name) and maker.name != "iterate":
                return f"{path!r} is changed before a loop reads it"
            links.add(maker.name)
            number = maker.ins[0]
        if {"iterate", "enter"} <= links:
            return f"several loops read {path!r}"
        if "enter" in links:
            self.read_by_scans.add(path)
        return entry, path, steps

    def _delta(self, entry: int, path: str, steps: list[Operation], value: Any) -> dict[str, Any]:
        """What makes a leaf's view larger by `value`, which is constant where it broadcasts."""

        def view(x: Any) -> Any:
            for step in reversed(steps):
                x = run_operation(step, [x])[0] if is_view(step.name) else x
            return x

        like = jnp.zeros(self.graph.program.avals[entry].shape, jnp.float32)
        out, back = jax.vjp(view, like)
        stretched = tuple(i for i, n in enumerate(out.shape) if n < value.shape[i])
        mean = jnp.mean(value, stretched, keepdims=True)
        return {path: back(mean)[0] / back(jnp.ones_like(out))[0]}


def _weighted_mean(contribution: Any, result: Any, free: tuple[int, ...]) -> Any:
    """The mean of a contribution over examples and places.

    Places where the sum itself is large count less, by its squared norm: a few outliers, such as the
    separator token of a transformer, would otherwise move all other places.
    """
    others = tuple(i for i in range(contribution.ndim) if i not in free)
    sizes = jnp.sum(jnp.square(result.astype(jnp.float32)), free, keepdims=True)
    weights = 1 / (sizes + jnp.mean(sizes) * 1e-3 + 1e-30)
    weighted = jnp.sum(contribution.astype(jnp.float32) * weights, others, keepdims=True)
    total = jnp.sum(jnp.broadcast_to(weights, contribution.shape), others, keepdims=True)
    return jnp.broadcast_to(weighted / total, contribution.shape)


def _along(flags: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return flags.reshape([-1 if i == axis else 1 for i in range(rank)])


def _axes_of(
    graph: Graph, operation: Operation, side: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The summed axes of the data operand, and the axes of the result that the parameter has too."""
    numbers = operation.params["dimension_numbers"]
    if operation.name == "conv_general_dilated":
        spec = (numbers.lhs_spec, numbers.rhs_spec)[side]
        return (spec[1],), (numbers.out_spec[1],)
    contracting, batch = numbers
    ranks = [len(graph.program.avals[i].shape) for i in operation.ins]
    shared = len(batch[0])
    own = [rank - len(c) - shared for rank, c in zip(ranks, contracting, strict=True)]
    start = shared + (own[0] if side == 0 else 0)
    return contracting[side], (*range(shared), *range(start, start + own[1 - side]))
