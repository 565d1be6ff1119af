"""A function run on compressed leaves: the traced program, with other products."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._types import is_compressed
from jaxprune.program import (
    Executor,
    HookResult,
    Operation,
    Step,
    TraceCache,
    Tracked,
    inputs_of,
    is_product,
    layout_of,
    restored,
    run_operation,
    standard,
    trace_program,
)
from jaxprune.quantize import ActivationQuantized, DynamicInput, QuantizedArray
from jaxprune.runtime._activations import How, rounded
from jaxprune.runtime._choose import Choice, dense_bytes, lowering_for, run
from jaxprune.runtime._convolve import convolution_for, convolved
from jaxprune.runtime._factors import factored_convolution, sides_of, two_products
from jaxprune.runtime._rows import looked_up
from jaxprune.runtime._sparse import as_quantized
from jaxprune.share import ClusteredArray, LowRankArray, TiedTree, TuckerArray
from jaxprune.sparse import SparseArray

_WARN_BYTES = 64 * 2**20


class CompressedFunction:
    """A function that takes compressed leaves, from `jp.compressed`.

    Attributes:
      choices: how each operation on a compressed leaf ran, for the inputs traced last.
    """

    def __init__(self, fn: Callable[..., Any], activations: How, *, explain: bool) -> None:
        """Made by `jp.compressed`."""
        self._fn, self._activations, self._explain = fn, activations, explain
        self._programs = TraceCache()
        self.choices: tuple[Choice, ...] = ()
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__wrapped__ = fn

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        params = params.expand() if isinstance(params, TiedTree) else params
        paths, leaves, treedef = _trees.flatten(params)
        inputs = inputs_of(args, kwargs)
        shapes = [
            jax.ShapeDtypeStruct(np.shape(x) if not is_compressed(x) else x.shape, _dtype(x))
            for x in leaves
        ]
        key = (treedef, *((s.shape, s.dtype) for s in shapes), inputs.key)
        dense = treedef.unflatten(shapes)
        program = self._programs.get(key, lambda: trace_program(self._fn, dense, *args, **kwargs))
        run = _Run(self._activations)
        held = [hold(leaf, path) for leaf, path in zip(leaves, paths, strict=True)]
        outs, _ = run.executor().run(program, [*held, *inputs.arrays])
        self.choices = tuple(run.choices)
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
class _Run:
    """One pass over a program with held leaves."""

    activations: How
    choices: list[Choice] = field(default_factory=list)

    def executor(self) -> Executor:
        return Executor(self._use, dense=self._dense)

    def _use(self, step: Step) -> HookResult:
        operation, operands, _ = step
        name = operation.name
        if name == "gather" and isinstance(operands[0], Tracked):
            return HookResult(self._rows(operation, *operands[:2]))
        if not is_product(name):
            return HookResult()
        sides = [i for i in (0, 1) if isinstance(operands[i], Tracked)]
        if len(sides) != 1:
            return HookResult(reason="both operands are compressed")
        side = sides[0]
        operands = [_codes(x) if isinstance(x, Tracked) else x for x in operands]
        if not jnp.issubdtype(operands[1 - side].dtype, jnp.floating):
            return HookResult(reason="the other operand is no float")
        if name == "dot_general":
            return self._product(operation, operands[side], operands[1 - side], side)
        if side == 0 or name != "conv_general_dilated":
            return HookResult(reason="it is what is convolved, not the kernel" if side == 0 else "")
        return self._convolution(operation, *operands)

    def _dense(self, operation: Operation | None, held: Tracked, why: str) -> None:
        if is_compressed(held.array):
            self._note(operation, held, (held.shape,), "dense", why)

    def _note(
        self, operation: Operation | None, held: Tracked, shapes: Any, lowering: str, why: str
    ) -> None:
        name = operation.name if operation else "output"
        source = operation.source if operation else ""
        size = dense_bytes(held.array) if lowering == "dense" else 0
        self.choices.append(Choice(held.path, name, tuple(shapes), lowering, why, source, size))

    def _how(self, held: Tracked) -> How:
        return self.activations if held.note is None else held.note

    def _product(self, operation: Operation, held: Tracked, x: Any, side: int) -> HookResult:
        how = self._how(held)
        shapes = (x.shape, held.shape)
        layout = layout_of(operation, held, x, side)
        if isinstance(held.array, LowRankArray) and sides_of(held.array, layout):
            self._note(operation, held, shapes, "factors", "one after the other, through the rank")
            rows = standard(operation, x.astype(jnp.float32), side, layout)
            y = restored(two_products(rows, held.array, layout, how), held, side, layout)
            return HookResult([y.astype(self._result(operation, x, held))])
        if not _has_products(held.array):
            if how is None:
                return HookResult(reason=f"no product of its own for {type(held.array).__name__}")
            self._note(operation, held, shapes, "rounded", "activations are rounded first")
            axes = operation.params["dimension_numbers"][0][1 - side]
            pair = [rounded(x, tuple(axes), how), held.materialize()]
            return HookResult(run_operation(operation, pair if side else pair[::-1]))
        packed = _is_packed(held.array) and len(layout.shape) - 1 in layout.batch
        if packed or len(layout.shape) < 2:
            return HookResult(reason="codes of one byte belong to different products")
        name, why = lowering_for(held.array, how, layout)
        self._note(operation, held, shapes, name, why)
        rows = standard(operation, x.astype(jnp.float32), side, layout)
        y = restored(run(name, rows, held.array, layout, how), held, side, layout)
        return HookResult([y.astype(self._result(operation, x, held))])

    def _result(self, operation: Operation, x: Any, held: Tracked) -> Any:
        """The dtype of a product."""
        wanted = operation.params["preferred_element_type"]
        return wanted or jnp.result_type(x.dtype, held.array.dtype)

    def _convolution(self, operation: Operation, x: Any, held: Tracked) -> HookResult:
        """A convolution of perhaps rounded activations."""
        how = self._how(held)
        if isinstance(held.array, LowRankArray | TuckerArray) and how is None:
            y = factored_convolution(operation, x, held)
            if isinstance(y, str):
                return HookResult(reason=y)
            shapes = (x.shape, held.shape)
            self._note(operation, held, shapes, "factors", "smaller convolutions in a row")
            return HookResult([y])
        if not _has_products(held.array) and how is None:
            return HookResult(reason=f"no convolution of its own for {type(held.array).__name__}")
        name, why = convolution_for(operation, x, held, how)
        self._note(operation, held, (x.shape, held.shape), name, why)
        return HookResult([convolved(name, operation, x, held, how)])

    def _rows(self, operation: Operation, held: Tracked, index: Any) -> list[Any] | None:
        """A look-up of whole entries of the leading axis."""
        spec = operation.params["dimension_numbers"]
        sizes, rank = tuple(operation.params["slice_sizes"]), len(held.shape)
        lead = np.ndim(index) - 1
        factors = isinstance(held.array, LowRankArray) and held.array.batch == 0
        if isinstance(held.array, SparseArray) and held.array.axis == -rank:
            return None  # a row is spread over values of its neighbours
        rows = (
            (_has_products(held.array) or factors)
            and rank >= 2
            and held.is_straight
            and tuple(spec.collapsed_slice_dims) == (0,)
            and tuple(spec.start_index_map) == (0,)
            and not spec.operand_batching_dims
            and sizes == (1, *held.shape[1:])
            and tuple(spec.offset_dims) == tuple(range(lead, lead + rank - 1))
        )
        if not rows:
            return None
        wanted = index[..., 0]
        inside = jnp.clip(wanted, 0, held.shape[0] - 1)
        found = looked_up(held.array, inside)
        if "FILL" in str(operation.params["mode"]):
            fill = operation.params.get("fill_value")
            value = jnp.nan if fill is None else fill
            present = jnp.expand_dims(wanted == inside, tuple(range(lead, lead + rank - 1)))
            found = jnp.where(present, found, value).astype(found.dtype)
        why = "only rows are made dense"
        self._note(operation, held, (held.shape, np.shape(index)), "rows", why)
        return [found]


def _codes(held: Tracked) -> Tracked:
    """A pruned leaf with quantized values is one of codes in a product."""
    found = as_quantized(held.array) if isinstance(held.array, SparseArray) else None
    return held if found is None else replace(held, array=found)


def _has_products(array: Any) -> bool:
    return isinstance(array, QuantizedArray | SparseArray) or (
        isinstance(array, ClusteredArray) and array.is_plain
    )


def _is_packed(array: QuantizedArray | ClusteredArray | SparseArray) -> bool:
    if isinstance(array, SparseArray):
        return False
    bits = array.bits if isinstance(array, ClusteredArray) else array.spec.width
    return bits < 8


def hold(leaf: Any, path: str) -> Any:
    """A leaf as it enters a program: compressed ones, and those with quantized inputs, are followed."""
    if isinstance(leaf, ActivationQuantized):
        return Tracked.of(leaf.weight, path, leaf.input)
    if getattr(leaf, "is_trained", False):  # dense in memory as it is
        return leaf.materialize()
    return Tracked.of(leaf, path) if is_compressed(leaf) else leaf


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
      activations: `None` (weight-only), `"int8"` or `"float8_e4m3fn"`: what multiplies compressed
        weights is quantized, one scale per row (token; per example in convolutions), as it comes.
        Leaves of `jp.quantize_activations` carry their own.
      explain: print, whenever the function runs or is traced, how each compressed leaf was used.

    Returns:
      A function of the same signature, whose `params` may hold compressed leaves, or be a `TiedTree`;
      it jits, maps and differentiates with respect to its other inputs like `fn`. Its `choices` and
      `table` tell how leaves were used.

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
    _checks.choice("activations", activations, (None, "int8", "float8_e4m3fn"))
    how = None if activations is None else DynamicInput(activations)
    return CompressedFunction(fn, how, explain=explain)
