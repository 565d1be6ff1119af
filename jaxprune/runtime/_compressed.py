"""A function run on compressed leaves: the traced program, with other products."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._types import is_compressed
from jaxprune.graph import (
    NestedRun,
    Operation,
    Program,
    inputs_of,
    nested_run,
    open_program,
    run_operation,
    trace_program,
)
from jaxprune.quantize import QuantizedArray
from jaxprune.runtime._choose import Choice, dense_bytes, lowering_for, run
from jaxprune.runtime._held import Held, converted, hold, looked_up, transposed, unstacked

_WARN_BYTES = 64 * 2**20


class CompressedFunction:
    """A function that takes compressed leaves, from `jp.compressed`.

    Attributes:
      choices: how each operation on a compressed leaf ran, for the inputs traced last.
    """

    def __init__(self, fn: Callable[..., Any], activations: str | None, *, explain: bool) -> None:
        """Made by `jp.compressed`."""
        self._fn, self._activations, self._explain = fn, activations, explain
        self._programs: dict[Any, Program] = {}
        self.choices: tuple[Choice, ...] = ()
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__wrapped__ = fn

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        paths, leaves, treedef = _trees.flatten(params)
        inputs = inputs_of(args, kwargs)
        shapes = [
            jax.ShapeDtypeStruct(np.shape(x) if not is_compressed(x) else x.shape, _dtype(x))
            for x in leaves
        ]
        key = (treedef, *((s.shape, s.dtype) for s in shapes), inputs.key)
        if key not in self._programs:
            dense = treedef.unflatten(shapes)
            self._programs[key] = trace_program(self._fn, dense, *args, **kwargs)
        program = self._programs[key]
        runner = _Runner(self._activations)
        held = [hold(leaf, path) for leaf, path in zip(leaves, paths, strict=True)]
        outs = runner.run(program, [*held, *inputs.arrays])
        self.choices = tuple(runner.choices)
        self._tell()
        return program.out_tree.unflatten(outs)

    @property
    def table(self) -> Table:
        """The choices as a `rich` table."""
        table = Table(title="Products of compressed leaves")
        for column in ("leaf", "operation", "shapes", "lowering", "why"):
            table.add_column(column, overflow="fold")
        for choice in self.choices:
            shapes = " · ".join("×".join(map(str, shape)) for shape in choice.shapes)
            table.add_row(choice.path, choice.primitive, shapes, choice.lowering, choice.why)
        return table

    def _tell(self) -> None:
        if self._explain:
            Console().print(self.table)
        dense = {c.path: c for c in self.choices if c.lowering == "dense"}
        total = sum(choice.dense_bytes for choice in dense.values())
        if total > _WARN_BYTES:
            worst = max(dense.values(), key=lambda choice: choice.dense_bytes)
            warnings.warn(
                f"compressed: {len(dense)} leaves of {total / 1e6:.0f} MB are made dense in every call, "
                f"such as {worst.path!r} for {worst.primitive} at {worst.source}: {worst.why}; "
                "explain=True lists them",
                stacklevel=3,
            )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


@dataclass
class _Runner:
    """One pass over a program with held leaves."""

    activations: str | None
    choices: list[Choice] = field(default_factory=list)

    def run(self, program: Program, inputs: list[Any]) -> list[Any]:
        values = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
        for operation in program.operations:
            operands = [values[i] for i in operation.ins]
            if any(isinstance(x, Held) for x in operands):
                outs = self._held(operation, operands)
            else:
                outs = run_operation(operation, operands)
            values.update(zip(operation.outs, outs, strict=True))
        return [self._dense(values[i], None, "it is returned") for i in program.outputs]

    def _held(self, operation: Operation, operands: list[Any]) -> list[Any]:
        name, params = operation.primitive.name, operation.params
        first = operands[0]
        found: Any = None
        if name in ("optimization_barrier", "copy", "name", "sharding_constraint"):
            return list(operands[: len(operation.outs)])
        if isinstance(first, Held):
            if name == "transpose":
                found = transposed(first, params["permutation"])
            elif name == "convert_element_type":
                found = converted(first, params["new_dtype"])
            elif name == "gather":
                found = self._rows(operation, first, operands[1])
        if name == "dot_general":
            found = self._product(operation, *operands[:2])
        if found is not None:
            return [found]
        nested = nested_run(operation)
        if nested is not None:
            return self._nested(operation, operands, nested)
        why = f"no other way to run {name} on it"
        return run_operation(operation, [self._dense(x, operation, why) for x in operands])

    def _dense(self, x: Any, operation: Operation | None, why: str) -> Any:
        if not isinstance(x, Held):
            return x
        self._note(operation, x, (x.shape,), "dense", why)
        return x.materialize()

    def _note(
        self, operation: Operation | None, held: Held, shapes: Any, lowering: str, why: str
    ) -> None:
        name = operation.primitive.name if operation else "output"
        source = operation.source if operation else ""
        size = dense_bytes(held.array) if lowering == "dense" else 0
        self.choices.append(Choice(held.path, name, tuple(shapes), lowering, why, source, size))

    def _rows(self, operation: Operation, held: Held, index: Any) -> Any:
        """A look-up of whole rows of a matrix."""
        spec = operation.params["dimension_numbers"]
        sizes = operation.params["slice_sizes"]
        rows = (
            tuple(spec.collapsed_slice_dims) == (0,)
            and tuple(spec.start_index_map) == (0,)
            and not spec.operand_batching_dims
            and tuple(sizes) == (1, held.shape[-1])
            and tuple(spec.offset_dims) == (np.ndim(index) - 1,)
        )
        if not rows:
            return None
        wanted = index[..., 0]
        inside = jnp.clip(wanted, 0, held.shape[0] - 1)
        found = looked_up(held, inside)
        if found is None:
            return None
        if "FILL" in str(operation.params["mode"]):
            fill = operation.params.get("fill_value")
            value = jnp.nan if fill is None else fill
            found = jnp.where((wanted == inside)[..., None], found, value).astype(found.dtype)
        self._note(
            operation, held, (held.shape, np.shape(index)), "rows", "only rows are made dense"
        )
        return found

    def _product(self, operation: Operation, lhs: Any, rhs: Any) -> Any:
        """A product with a held matrix on one side; `None` where it must be dense."""
        sides = [isinstance(lhs, Held), isinstance(rhs, Held)]
        if sides.count(True) != 1:
            return None
        side = sides.index(True)
        held, x = (lhs, rhs) if side == 0 else (rhs, lhs)
        contract, batch = operation.params["dimension_numbers"]
        mine, other = contract[side], contract[1 - side]
        matrix = len(held.shape) == 2 and len(mine) == 1 and not batch[0]
        if not matrix or not isinstance(held.array, QuantizedArray):
            return None
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        across = held.order[mine[0]] == -1
        x = jnp.moveaxis(x, other[0], -1)
        rows = int(np.prod(x.shape[:-1]))
        name, why, codes = lowering_for(held.array, self.activations, across=across, rows=rows)
        if codes is None:
            return self._dense_product(operation, lhs, rhs, why)
        self._note(operation, held, (x.shape, held.shape), name, why)
        y = run(name, x.reshape(rows, x.shape[-1]), codes).reshape(*x.shape[:-1], -1)
        if side == 0:  # the free axis of the left operand comes first
            y = jnp.moveaxis(y, -1, 0)
        wanted = operation.params["preferred_element_type"] or jnp.result_type(
            x.dtype, held.array.dtype
        )
        return y.astype(wanted)

    def _dense_product(self, operation: Operation, lhs: Any, rhs: Any, why: str) -> Any:
        operands = [self._dense(x, operation, why) for x in (lhs, rhs)]
        return run_operation(operation, operands)[0]

    def _nested(self, operation: Operation, operands: list[Any], nested: NestedRun) -> list[Any]:
        """A loop or a branch: what it carries is dense, what it reads or maps over stays compressed."""
        ready = []
        for i, x in enumerate(operands):
            if isinstance(x, Held) and nested.slices(i) and (layers := unstacked(x)) is not None:
                ready.append(layers)
            elif isinstance(x, Held) and nested.reads(i):
                ready.append(x)
            else:
                ready.append(
                    self._dense(x, operation, "a loop carries it, or slices across scales")
                )
        turns = [self._turn(open_program(jaxpr)) for jaxpr in nested.jaxprs]
        return nested.run(operation.params, turns, ready)

    def _turn(self, program: Program) -> Callable[..., list[Any]]:
        return lambda *xs: self.run(program, list(xs))


def compressed(
    fn: Callable[..., Any], *, activations: str | None = None, explain: bool = False
) -> CompressedFunction:
    """Makes a function take compressed leaves, and run fast on them.

    The function is traced as for dense leaves. Compressed matrices flow through transposes and
    conversions to products, which run on the codes; embeddings are looked up compressed; loops over
    stacked layers keep them; what has no such way is made dense in the call, and listed. On CPU, products
    with integer codes split activations into two 8-bit planes, so that integer products do the work at
    nearly float precision (relative error about 3e-5).

    Args:
      fn: `fn(params, *args)`, any traceable function.
      activations: `None` (weight-only), or `"int8"`: what multiplies integer codes is quantized to 8
        bits, one scale per row (token), as it comes.
      explain: print, whenever the function runs or is traced, how each compressed leaf was used.

    Returns:
      A function of the same signature, whose `params` may hold compressed leaves; it jits, maps and
      differentiates with respect to its other inputs like `fn`. Its `choices` and `table` tell how leaves
      were used.

    Raises:
      ValueError: unknown `activations`, or an `fn` that cannot be traced.

    Warns:
      UserWarning: leaves of more than 64 MiB together are made dense in a call.

    Example:
      >>> params = {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> run = jp.compressed(fn)
      >>> y = run(jp.quantize_tree(params, bits=4), jnp.ones((2, 64)))
      >>> y.shape, [choice.lowering for choice in run.choices]
      ((2, 32), ['two_planes'])
    """
    _checks.choice("activations", activations, (None, "int8"))
    return CompressedFunction(fn, activations, explain=explain)
