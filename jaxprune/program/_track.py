"""Following parameters through a program, from where they enter to the operations that use them.

A followed parameter passes through views (transpose, conversion, reshape, slices of its first axis)
without being touched, and through loops that read it or map over it. What uses it, a hook sees first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import is_compressed
from jaxprune.program._nested import NestedRun, nested_run
from jaxprune.program._program import Operation, Program, open_program
from jaxprune.program._run import run_operation

_COPIES = (
    "optimization_barrier",
    "copy",
    "copy_p",
    "name",
    "sharding_constraint",
    "reduce_precision",
)


@partial(
    jax.tree_util.register_dataclass, data_fields=("array", "note"), meta_fields=("order", "path")
)
@dataclass(frozen=True)
class Held:
    """A parameter on its way: the array, and the order in which its axes are read.

    Attributes:
      array: a compressed leaf, not made dense, or a plain array.
      order: axes of the array, counted from the end, in the order in which they are read.
      path: path of the leaf.
      note: arrays that travel along; those with axes are stacked as the leaf is in loops over layers.
    """

    array: Any
    order: tuple[int, ...]
    path: str
    note: Any = None

    @classmethod
    def of(cls, array: Any, path: str, note: Any = None) -> "Held":
        """An array as it enters."""
        return cls(array, tuple(range(-len(array.shape), 0)), path, note)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as it is read."""
        return tuple(self.array.shape[i] for i in self.order)

    @property
    def dtype(self) -> Any:
        """Dtype as it is read."""
        return self.array.dtype

    @property
    def is_straight(self) -> bool:
        """Whether the axes are read in their own order."""
        return self.order == tuple(range(-len(self.order), 0))

    def materialize(self) -> jax.Array:
        """The dense array as it is read."""
        dense = _trees.dense(self.array)
        return (
            dense
            if self.is_straight
            else jnp.transpose(dense, [i % dense.ndim for i in self.order])
        )


class Use(NamedTuple):
    """An operation on a followed parameter.

    Attributes:
      operation: the operation.
      operands: its operands; followed ones are `Held`.
    """

    operation: Operation
    operands: list[Any]


Record = dict[str, Any]
"""What a hook notes of an operation, by path: pytrees of arrays."""


class Found(NamedTuple):
    """What a hook makes of an operation.

    Attributes:
      outs: results, or `None` to run the operation on dense arrays.
      record: what is noted; within a scan, a record of a parameter that is mapped over is stacked.
      why: the reason why it runs on dense arrays.
    """

    outs: list[Any] | None = None
    record: Record | None = None
    why: str = ""


@dataclass(frozen=True)
class Follower:
    """How followed parameters are used.

    Attributes:
      use: asked about every operation on a followed parameter that is no view.
      dense: told of every one that is made dense: `(operation, held, why)`; the operation is `None`
        for a result of the program.
      merge: `(records, stacked) -> record`: records of one path joined into one; `stacked` says that
        they are one record with a leading axis over the turns of a loop that only reads the parameter.
    """

    use: Callable[[Use], Found]
    dense: Callable[[Operation | None, Held, str], None] = lambda operation, held, why: None
    merge: Callable[[list[Any], bool], Any] = lambda records, stacked: records[0]

    def run(self, program: Program, inputs: list[Any]) -> tuple[list[Any], Record]:
        """Runs a program, some of whose inputs are `Held`: its results, and what was noted."""
        notes: dict[str, list[Any]] = {}
        outs = self._run(program, inputs, notes)
        return [self._dense(x, None, "it is returned") for x in outs], self._joined(notes)

    def _joined(self, notes: dict[str, list[Any]]) -> Record:
        return {
            path: found[0] if len(found) == 1 else self.merge(found, False)
            for path, found in notes.items()
        }

    def _run(self, program: Program, inputs: list[Any], notes: dict[str, list[Any]]) -> list[Any]:
        values = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
        for operation in program.operations:
            operands = [values[i] for i in operation.ins]
            if any(isinstance(x, Held) for x in operands):
                shape = tuple(program.avals[operation.outs[0]].shape) if operation.outs else ()
                outs = self._held(operation, operands, shape, notes)
            else:
                outs = run_operation(operation, operands)
            values.update(zip(operation.outs, outs, strict=True))
        return [values[i] for i in program.outputs]

    def _held(
        self,
        operation: Operation,
        operands: list[Any],
        shape: tuple[int, ...],
        notes: dict[str, list[Any]],
    ) -> list[Any]:
        seen = view(operation, operands, shape)
        if seen is not None:
            return seen
        nested = nested_run(operation)
        if nested is not None:
            return self._nested(operation, operands, nested, notes)
        found = self.use(Use(operation, operands))
        for path, record in (found.record or {}).items():
            notes.setdefault(path, []).append(record)
        if found.outs is not None:
            return found.outs
        why = found.why or f"no other way to run {operation.primitive.name} on it"
        return run_operation(operation, [self._dense(x, operation, why) for x in operands])

    def _dense(self, x: Any, operation: Operation | None, why: str) -> Any:
        if not isinstance(x, Held):
            return x
        self.dense(operation, x, why)
        return x.materialize()

    def _nested(
        self,
        operation: Operation,
        operands: list[Any],
        nested: NestedRun,
        notes: dict[str, list[Any]],
    ) -> list[Any]:
        """A loop or a branch: what it carries is dense, what it reads or maps over is followed."""
        ready, mapped = [], set()
        for i, x in enumerate(operands):
            if isinstance(x, Held) and nested.slices(i) and (layers := unstacked(x)) is not None:
                mapped.add(x.path)
                ready.append(layers)
            elif isinstance(x, Held) and nested.reads(i):
                ready.append(x)
            else:
                ready.append(
                    self._dense(x, operation, "a loop carries it, or slices across scales")
                )
        if operation.primitive.name != "scan":
            turns = [self._turn(open_program(jaxpr), None) for jaxpr in nested.jaxprs]
            return nested.run(operation.params, turns, ready)
        # what is noted in a turn leaves it as further results, which the scan stacks
        trees: list[Any] = []
        turn = self._turn(open_program(nested.jaxprs[0]), trees)
        outs = nested.run(operation.params, [turn], ready)
        count = len(operation.outs)
        for path, record in jax.tree.unflatten(trees[-1], outs[count:]).items():
            notes.setdefault(path, []).append(
                record if path in mapped else self.merge([record], True)
            )
        return outs[:count]

    def _turn(self, program: Program, trees: list[Any] | None) -> Callable[..., list[Any]]:
        def turn(*xs: Any) -> list[Any]:
            notes: dict[str, list[Any]] = {}
            outs = self._run(program, list(xs), notes)
            outs = [self._dense(x, None, "it is returned") for x in outs]
            if trees is None:
                return outs
            leaves, tree = jax.tree.flatten(self._joined(notes))
            trees.append(tree)
            return [*outs, *leaves]

        return turn


def view(operation: Operation, operands: list[Any], shape: tuple[int, ...]) -> list[Any] | None:
    """The results of an operation that only looks at a followed parameter in another way, or `None`.

    `shape` is that of its first result.
    """
    name, params = operation.primitive.name, operation.params
    first = operands[0]
    if name in _COPIES:
        return list(operands[: len(operation.outs)])
    if not isinstance(first, Held):
        return None
    if name == "transpose":
        return [replace(first, order=tuple(first.order[i] for i in params["permutation"]))]
    if name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
        return _changed(first, "astype", params["new_dtype"])
    more_axes = name == "broadcast_in_dim" and np.prod(shape) == np.prod(first.shape)
    if (name in ("reshape", "squeeze", "expand_dims") or more_axes) and first.is_straight:
        return _reshaped(first, shape)
    if name == "slice":
        return _sliced(first, params)
    if name == "dynamic_slice":
        return _dynamically_sliced(first, operands[1:], params["slice_sizes"])
    return None


def _changed(held: Held, method: str, *arguments: Any) -> list[Any] | None:
    """The array changed by a method of its own; `None` where it has none, or refuses."""
    change = getattr(held.array, method, None)
    if change is None:
        return None
    try:
        return [replace(held, array=change(*arguments))]
    except TypeError:
        return None


def _reshaped(held: Held, shape: tuple[int, ...]) -> list[Any] | None:
    found = _changed(held, "reshape", shape)
    if found is None:
        return None
    array, note = found[0].array, held.note
    if note is not None and len(held.shape) > len(shape) and held.shape[:1] == (1,):
        note = _index_note(note, 0)  # one layer out of a stack
    return [Held.of(array, held.path, note)]


def _index_note(note: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index] if jnp.ndim(x) else x, note)


def _sliced(held: Held, params: dict[str, Any]) -> list[Any] | None:
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)
    whole = all(
        s == 0 and e == n and k == 1
        for s, e, n, k in zip(starts[1:], limits[1:], held.shape[1:], strides[1:], strict=True)
    )
    if not whole or not held.is_straight or strides[0] != 1:
        return None
    return _leading(held, starts[0], limits[0] - starts[0])


def _dynamically_sliced(held: Held, starts: list[Any], sizes: tuple[int, ...]) -> list[Any] | None:
    if not held.is_straight or tuple(sizes[1:]) != held.shape[1:]:
        return None
    return _leading(held, jnp.clip(starts[0], 0, held.shape[0] - sizes[0]), sizes[0])


def _leading(held: Held, start: Any, size: int) -> list[Any] | None:
    if not is_compressed(held.array):
        cut = jax.lax.dynamic_slice_in_dim(held.array, start, size)
        found: list[Any] | None = [replace(held, array=cut)]
    else:
        found = _changed(held, "block", start, size)
    if found is None or held.note is None:
        return found
    cut_note = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size) if jnp.ndim(x) else x
    return [replace(found[0], note=jax.tree.map(cut_note, held.note))]


def unstacked(held: Held) -> Held | None:
    """A stack of layers as each turn of a scan reads its slice; `None` where that is no view."""
    rank, length = len(held.order), held.shape[0] if held.order else 0
    if rank < 2 or held.order[0] != -rank:
        return None
    if hasattr(type(held.array), "stacked"):
        layers = held.array.stacked()
        if layers is None:
            return None
        held = replace(held, array=layers)
    parts = jax.tree.leaves(held.array)
    if any(np.shape(x)[:1] != (length,) for x in parts):
        return None
    notes = jax.tree.map(lambda x: x if jnp.ndim(x) else jnp.broadcast_to(x, (length,)), held.note)
    return replace(held, order=held.order[1:], note=notes)
