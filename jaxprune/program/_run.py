"""One executor for traced programs: operation by operation, inner programs included, each by a hook."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxprune.program._nested import Nesting, nesting_of
from jaxprune.program._program import Operation, Program
from jaxprune.program._track import Tracked, unstacked, view

Record = dict[str, Any]
"""What a hook notes of an operation, by name (a path, as a rule): pytrees of arrays."""


Body = Callable[..., tuple[list[Any], Record]]
"""An inner program as a function of its inputs: its results, and what was noted."""


class Step(NamedTuple):
    """An operation that is to run.

    Attributes:
      operation: the operation.
      operands: its operands; tracked parameters are `Tracked`.
      values: all values so far, by number, those around an inner program included.
    """

    operation: Operation
    operands: list[Any]
    values: Mapping[int, Any]


class HookResult(NamedTuple):
    """What a hook makes of an operation.

    Attributes:
      outs: results, or `None` to run the operation, on dense arrays, or its inner programs step by step.
      record: what is noted; within a scan, records are stacked.
      reason: why it runs on dense arrays.
    """

    outs: list[Any] | None = None
    record: Record | None = None
    reason: str = ""


def _lost(name: str, operation: Operation) -> None:
    warnings.warn(
        f"{name!r}: what happens to it inside of {operation.name} at {operation.source} is not recorded",
        stacklevel=2,
    )


@dataclass(frozen=True)
class Executor:
    """How to run programs.

    Attributes:
      hook: asked about every operation that is no view of a tracked parameter, before it runs.
      note: asked for a record of every operation after it ran, given its results.
      enters: whether the inner programs of an operation run step by step, though no parameter is tracked
        into them. Functions with a gradient of their own, which lose it so, are entered only then.
      dense: told of every tracked parameter that is made dense: `(operation, tracked, reason)`; the
        operation is `None` for a result of the program.
      merge: `(name, records, stacked) -> record`: records of one name joined into one; `stacked` says
        that they are one record with a leading axis over the iterations of a scan that does not map over
        the parameter of that name.
      neutral: a record, given its shapes, that changes none it is merged with: what conditions and
        `while` loops record where nothing ran. Without one, what they record is lost, and told by `lost`.
      lost: `(name, operation)`.
      constant: `(number, value) -> value` of a constant.
    """

    hook: Callable[[Step], HookResult] = lambda step: HookResult()
    note: Callable[[Operation, list[Any]], Record | None] = lambda operation, outs: None
    enters: Callable[[Operation], bool] = lambda operation: False
    dense: Callable[[Operation | None, Tracked, str], None] = lambda operation, tracked, reason: (
        None
    )
    merge: Callable[[str, list[Any], bool], Any] = lambda name, records, stacked: records[0]
    neutral: Callable[[Any], Any] | None = None
    lost: Callable[[str, Operation], None] = _lost
    constant: Callable[[int, Any], Any] = lambda number, value: value

    def run(self, program: Program, inputs: list[Any]) -> tuple[list[Any], Record]:
        """Runs a program, some of whose inputs may be `Tracked`: its results, and what was noted."""
        return self._body(program, {}, *inputs)

    def _body(
        self, program: Program, around: Mapping[int, Any], *inputs: Any
    ) -> tuple[list[Any], Record]:
        records: dict[str, list[Any]] = {}
        values = {**around, **dict(zip(program.inputs, inputs, strict=True))}
        values.update((i, self.constant(i, value)) for i, value in program.constants.items())
        for operation in program.operations:
            step = Step(operation, [values[i] for i in operation.ins], values)
            shape = tuple(program.avals[operation.outs[0]].shape) if operation.outs else ()
            outs = self._step(step, shape, records)
            _add(records, self.note(operation, outs))
            values.update(zip(operation.outs, outs, strict=True))
        outs = [self._dense(values[i], None, "it is returned") for i in program.outputs]
        return outs, {
            name: found[0] if len(found) == 1 else self.merge(name, found, False)
            for name, found in records.items()
        }

    def _step(self, step: Step, shape: tuple[int, ...], records: dict[str, list[Any]]) -> list[Any]:
        operation, operands, _ = step
        tracked = any(isinstance(x, Tracked) for x in operands)
        if tracked:
            seen = view(operation, operands, shape)
            if seen is not None:
                return seen
        found = self.hook(step)
        _add(records, found.record)
        if found.outs is not None:
            return found.outs
        nesting = nesting_of(operation)
        entered = self.enters(operation) or (tracked and operation.name != "custom_vjp_call")
        if nesting is not None and entered:
            return self._nested(step, nesting, records)
        if not tracked:
            return run_operation(operation, operands)
        reason = found.reason or f"no other way to run {operation.name} on it"
        return run_operation(operation, [self._dense(x, operation, reason) for x in operands])

    def _dense(self, x: Any, operation: Operation | None, reason: str) -> Any:
        if not isinstance(x, Tracked):
            return x
        self.dense(operation, x, reason)
        return x.materialize()

    def _nested(self, step: Step, nesting: Nesting, records: dict[str, list[Any]]) -> list[Any]:
        """Inner programs, step by step: what a loop carries is dense, what it reads or slices is not."""
        operation, operands, values = step
        ready, mapped = [], set()
        for x, how in zip(operands, nesting.hows, strict=True):
            if isinstance(x, Tracked) and how == "slice" and (layers := unstacked(x)) is not None:
                mapped.add(x.path)
                x = layers
            elif how != "read":
                x = self._dense(x, operation, f"{operation.name} carries, splits or cuts it")
            ready.append(x)
        bodies: list[Body] = [partial(self._body, p, values) for p in operation.inner]
        run = _RUNS.get(operation.name, _run_once)
        outs, record = run(self, operation, nesting, bodies, ready)
        if operation.name == "scan":
            record = {k: x if k in mapped else self.merge(k, [x], True) for k, x in record.items()}
        _add(records, record)
        return outs


def _add(records: dict[str, list[Any]], record: Record | None) -> None:
    for name, x in (record or {}).items():
        records.setdefault(name, []).append(x)


def _with_records(body: Body, trees: list[Any]) -> Callable[..., list[Any]]:
    """What is noted leaves a body as further results."""

    def run(*xs: Any) -> list[Any]:
        outs, record = body(*xs)
        leaves, tree = jax.tree.flatten(record)
        trees.append(tree)
        return [*outs, *leaves]

    return run


def _run_scan(
    executor: Executor, operation: Operation, nesting: Nesting, bodies: list[Body], ready: list[Any]
) -> tuple[list[Any], Record]:
    trees: list[Any] = []
    outs = nesting.run(operation.params, [_with_records(bodies[0], trees)], ready)
    count = len(operation.outs)
    return outs[:count], jax.tree.unflatten(trees[-1], outs[count:])


def _run_once(
    executor: Executor, operation: Operation, nesting: Nesting, bodies: list[Body], ready: list[Any]
) -> tuple[list[Any], Record]:
    """A body that runs as part of what is around it; shards keep what they note to themselves."""
    noted: list[Record] = []

    def run(body: Body, *xs: Any) -> list[Any]:
        outs, record = body(*xs)
        noted.append(record)
        return outs

    outs = nesting.run(operation.params, [partial(run, body) for body in bodies], ready)
    if operation.name == "custom_vjp_call":
        return outs, noted[-1]
    for name in dict.fromkeys(name for record in noted for name in record):
        executor.lost(name, operation)
    return outs, {}


def _neutral(
    executor: Executor, operation: Operation, bodies: list[Body], ready: list[Any]
) -> Record:
    """What the bodies of an operation note, where they do not run."""
    assert executor.neutral is not None
    nesting, shapes = nesting_of(operation), {}
    assert nesting is not None
    for body, own in zip(bodies, nesting.operands, strict=True):
        shapes |= jax.eval_shape(lambda *xs, body=body: body(*xs)[1], *(ready[i] for i in own))
    return {name: executor.neutral(x) for name, x in shapes.items()}


def _run_cond(
    executor: Executor, operation: Operation, nesting: Nesting, bodies: list[Body], ready: list[Any]
) -> tuple[list[Any], Record]:
    if executor.neutral is None:
        return _run_once(executor, operation, nesting, bodies, ready)
    leaves, tree = jax.tree.flatten(none := _neutral(executor, operation, bodies, ready))

    def branch(body: Body, *xs: Any) -> list[Any]:
        outs, record = body(*xs)
        return [*outs, *jax.tree.leaves({**none, **record})]

    outs = nesting.run(operation.params, [partial(branch, body) for body in bodies], ready)
    return outs[: len(outs) - len(leaves)], jax.tree.unflatten(
        tree, outs[len(outs) - len(leaves) :]
    )


def _run_while(
    executor: Executor, operation: Operation, nesting: Nesting, bodies: list[Body], ready: list[Any]
) -> tuple[list[Any], Record]:
    """What an iteration notes is merged into what those before it did; conditions note nothing."""
    if executor.neutral is None:
        return _run_once(executor, operation, nesting, bodies, ready)
    start, tree = jax.tree.flatten(none := _neutral(executor, operation, bodies, ready))
    count = len(operation.inner[1].inputs)

    def iteration(*xs: Any) -> list[Any]:
        outs, record = bodies[1](*xs[:count])
        before = jax.tree.unflatten(tree, xs[count:])
        now = {k: executor.merge(k, [before[k], {**none, **record}[k]], False) for k in none}
        return [*outs, *jax.tree.leaves(now)]

    test = lambda *xs: bodies[0](*xs)[0]
    outs = nesting.run(operation.params, [test, iteration], [*ready, *start])
    count_out = len(operation.outs)
    return outs[:count_out], jax.tree.unflatten(tree, outs[count_out:])


_RUNS = {"scan": _run_scan, "while": _run_while, "cond": _run_cond}


def run_operation(operation: Operation, operands: list[Any]) -> list[Any]:
    """An operation as it was traced."""
    if operation.is_relu:
        return [jax.nn.relu(operands[0])]
    # some JAX versions return functions apart
    bound = operation.primitive.get_bind_params(operation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    result = operation.primitive.bind(*functions, *operands, **params)
    return list(result) if operation.primitive.multiple_results else [result]
