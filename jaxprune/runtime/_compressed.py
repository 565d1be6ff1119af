"""A function run on compressed leaves: the traced program, with other products."""

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._progress import stages
from jaxprune._types import is_compressed
from jaxprune.program import (
    Executor,
    HookResult,
    Layout,
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
from jaxprune.quantize import ActivationQuantized, DynamicInput
from jaxprune.runtime._activations import How, rounded
from jaxprune.runtime._choose import Choice, Settings, dense_bytes, lowering_for
from jaxprune.runtime._convolve import convolution_for, convolved
from jaxprune.runtime._lowerings import run
from jaxprune.runtime._rules import has_rule, rule_of
from jaxprune.runtime._tuning import parsed, thresholds_for

_WARN_BYTES = 64 * 2**20
_lowered_for: ContextVar[str | None] = ContextVar("lowered_for", default=None)


@contextmanager
def lowered_for(platform: str) -> Generator[None]:
    """What is traced meanwhile will run on `platform`, unless `jp.compressed` was told another."""
    token = _lowered_for.set(platform)
    try:
        yield
    finally:
        _lowered_for.reset(token)


@dataclass(frozen=True)
class Explanation:
    """How compressed leaves are used for some inputs; `rich` prints it as a table.

    Attributes:
      choices: how each operation on a compressed leaf runs.
    """

    choices: tuple[Choice, ...]

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

    def __rich__(self) -> Table:
        return self.table


class CompressedFunction:
    """A function that takes compressed leaves, from `jp.compressed`.

    Attributes:
      choices: how each operation on a compressed leaf ran, for the inputs traced last; see `explain`.
    """

    def __init__(
        self, fn: Callable[..., Any], activations: How, *, platform: str | None, tuning: Any
    ) -> None:
        """Made by `jp.compressed`."""
        self._fn, self._activations = fn, activations
        self._platform, self._tuning = platform, tuning
        self._programs = TraceCache()
        self.choices: tuple[Choice, ...] = ()
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__wrapped__ = fn

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        with stages(f"compressed {self.__name__}") as stage:
            out, self.choices = self._run(params, args, kwargs, stage)
        self._tell()
        return out

    def explain(self, params: Any, *args: Any, **kwargs: Any) -> Explanation:
        """How each compressed leaf would be used for inputs of these shapes; nothing is computed.

        Args:
          params, *args, **kwargs: as in a call; or `jax.ShapeDtypeStruct`.

        Example:
          >>> run = jp.compressed(lambda p, x: x @ p["w"])
          >>> found = run.explain(jp.quantize_tree({"w": jnp.ones((64, 32))}), jnp.ones((8, 64)))
          >>> [(choice.path, choice.lowering) for choice in found.choices]
          [('w', 'int8_split')]
        """
        found: list[tuple[Choice, ...]] = []
        inputs = inputs_of(args, kwargs)

        def call(params: Any, arrays: list[Any]) -> Any:
            args, kwargs = inputs.rebuild(arrays)
            out, choices = self._run(params, args, kwargs)
            found.append(choices)
            return out

        jax.eval_shape(call, params, inputs.arrays)
        return Explanation(found[-1])

    def _run(
        self, params: Any, args: Any, kwargs: Any, stage: Callable[[str], None] = lambda text: None
    ) -> tuple[Any, tuple[Choice, ...]]:
        stage("tracing")
        paths, leaves, treedef = _trees.flatten(_trees.resolve_ties(params))
        inputs = inputs_of(args, kwargs)
        shapes = [jax.ShapeDtypeStruct(np.shape(x), _dtype(x)) for x in leaves]
        key = (treedef, *((s.shape, s.dtype) for s in shapes), inputs.key)
        dense = treedef.unflatten(shapes)
        program = self._programs.get(key, lambda: trace_program(self._fn, dense, *args, **kwargs))
        platform = self._platform or _lowered_for.get() or jax.default_backend()
        run = _Run(Settings(self._activations, platform, thresholds_for(platform, self._tuning)))
        held = [hold(leaf, path) for leaf, path in zip(leaves, paths, strict=True)]
        stage(f"{len(program.operations)} operations on {len(leaves)} leaves")
        outs, _ = run.executor().run(program, [*held, *inputs.arrays])
        return program.out_tree.unflatten(outs), tuple(run.choices)

    @property
    def table(self) -> Table:
        """The choices as a `rich` table."""
        return Explanation(self.choices).table

    def _tell(self) -> None:
        dense = {c.path: c for c in self.choices if c.lowering == "dense"}
        total = sum(choice.dense_bytes for choice in dense.values())
        if total > _WARN_BYTES:
            worst = max(dense.values(), key=lambda choice: choice.dense_bytes)
            warnings.warn(
                f"compressed: {len(dense)} leaves of {total / 1e6:.0f} MB are made dense in every call, "
                f"such as {worst.path!r} for {worst.primitive} at {worst.source}: {worst.why}; "
                "explain(params, *args) lists them",
                stacklevel=3,
            )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


@dataclass
class _Run:
    """One pass over a program with held leaves."""

    settings: Settings
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
        held = operands[side]
        operands = list(operands)
        operands[side] = replace(held, array=rule_of(held.array).in_product(held.array))
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
        return self.settings.activations if held.note is None else held.note

    def _product(self, operation: Operation, held: Tracked, x: Any, side: int) -> HookResult:
        how, rule = self._how(held), rule_of(held.array)
        shapes = (x.shape, held.shape)
        layout = layout_of(operation, held, x, side)
        if self._result(operation, x, held) == jnp.float64:
            return HookResult(reason="codes multiply in float32, and the result is float64")
        rows = standard(operation, x, side, layout)
        y = None
        if rule.product is not None:
            y = rule.product(rows, held.array, layout, self._factor(how))
        if y is not None:
            self._note(operation, held, shapes, "factors", "its factors one after the other")
        elif rule.decoder is None:
            if how is None:
                return HookResult(reason=f"no product of its own for {type(held.array).__name__}")
            self._note(operation, held, shapes, "rounded", "activations are rounded first")
            axes = operation.params["dimension_numbers"][0][1 - side]
            pair = [rounded(x, tuple(axes), how), held.materialize()]
            return HookResult(run_operation(operation, pair if side else pair[::-1]))
        elif len(layout.shape) < 2 or (rule.is_packed(held.array) and _packs_batch(layout)):
            return HookResult(reason="codes of one byte belong to different products")
        else:
            name, why = lowering_for(held.array, how, layout, self.settings)
            self._note(operation, held, shapes, name, why)
            y = run(name, rows, held.array, layout, how)
        y = restored(y, held, side, layout)
        return HookResult([y.astype(self._result(operation, x, held))])

    def _factor(self, how: How) -> Callable[[Any, Any, Layout, bool], Any]:
        """Products with one of several factors; the first meets the activations."""

        def product(x: Any, factor: Any, layout: Layout, is_first: bool) -> Any:
            own = how if is_first else None
            if has_rule(factor) and not _packs_batch(layout):
                name, _ = lowering_for(factor, own, layout, self.settings)
                return run(name, x, factor, layout, own)
            x = rounded(x, tuple(range(x.ndim - len(layout.contract), x.ndim)), own)
            dense = _trees.dense(factor).astype(jnp.float32)
            y = layout.dot(x.astype(jnp.float32)[None], dense, jnp.float32)
            return jnp.squeeze(y, len(layout.batch))

        return product

    def _result(self, operation: Operation, x: Any, held: Tracked) -> Any:
        """The dtype of a product."""
        wanted = operation.params["preferred_element_type"]
        return wanted or jnp.result_type(x.dtype, held.array.dtype)

    def _convolution(self, operation: Operation, x: Any, held: Tracked) -> HookResult:
        """A convolution of perhaps rounded activations."""
        how, rule = self._how(held), rule_of(held.array)
        shapes = (x.shape, held.shape)
        if rule.convolution is not None and how is None:
            y = rule.convolution(operation, x, held)
            if isinstance(y, str):
                return HookResult(reason=y)
            self._note(operation, held, shapes, "factors", "smaller convolutions in a row")
            return HookResult([y])
        name, why = convolution_for(operation, x, held, how, self.settings.platform)
        if name == "rounded" and how is None:
            return HookResult(reason=f"no convolution of its own for {type(held.array).__name__}")
        self._note(operation, held, shapes, name, why)
        return HookResult([convolved(name, operation, x, held, how)])

    def _rows(self, operation: Operation, held: Tracked, index: Any) -> list[Any] | None:
        """A look-up of whole entries of the leading axis."""
        spec = operation.params["dimension_numbers"]
        sizes, rank = tuple(operation.params["slice_sizes"]), len(held.shape)
        lead = np.ndim(index) - 1
        take = rule_of(held.array).take_rows
        rows = (
            rank >= 2
            and held.is_straight
            and tuple(spec.collapsed_slice_dims) == (0,)
            and tuple(spec.start_index_map) == (0,)
            and not spec.operand_batching_dims
            and sizes == (1, *held.shape[1:])
            and tuple(spec.offset_dims) == tuple(range(lead, lead + rank - 1))
        )
        if not rows or take is None:
            return None
        wanted = index[..., 0]
        inside = jnp.clip(wanted, 0, held.shape[0] - 1)
        found = take(held.array, inside.reshape(-1)).reshape(*inside.shape, *held.shape[1:])
        if "FILL" in str(operation.params["mode"]):
            fill = operation.params.get("fill_value")
            value = jnp.nan if fill is None else fill
            present = jnp.expand_dims(wanted == inside, tuple(range(lead, lead + rank - 1)))
            found = jnp.where(present, found, value).astype(found.dtype)
        why = "only rows are made dense"
        self._note(operation, held, (held.shape, np.shape(index)), "rows", why)
        return [found]


def _packs_batch(layout: Layout) -> bool:
    return len(layout.shape) - 1 in layout.batch


def hold(leaf: Any, path: str) -> Any:
    """A leaf as it enters a program: compressed ones, and those with quantized inputs, are followed."""
    if isinstance(leaf, ActivationQuantized):
        return Tracked.of(leaf.weight, path, leaf.input)
    if getattr(leaf, "is_trained", False):  # dense in memory as it is
        return leaf.materialize()
    return Tracked.of(leaf, path) if is_compressed(leaf) else leaf


def compressed(
    fn: Callable[..., Any],
    *,
    activations: str | None = None,
    platform: str | None = None,
    tuning: Any = None,
) -> CompressedFunction:
    """Makes a function take compressed leaves, and run fast on them.

    The function is traced as for dense leaves. Compressed matrices flow through transposes and
    conversions to products, which run on the codes; embeddings are looked up compressed; loops over
    stacked layers keep them; what has no such way is made dense in the call, and listed. On CPU, products
    with integer codes split activations into two int8 parts, so that integer products do the work at
    nearly float precision: the largest error is at most 5e-4 of the results' root mean square. Outliers
    and values that are not finite are found as the program runs, and such products are ones of floats.
    Results of float64 are computed on dense leaves.

    Args:
      fn: `fn(params, *args)`, any traceable function.
      activations: `None` (weight-only), `"int8"` or `"float8_e4m3fn"`: what multiplies compressed
        weights is quantized, one scale per row (token; per example in convolutions), as it comes.
        Leaves of `jp.quantize_activations` carry their own.
      platform: where the program will run, `"cpu"`, `"gpu"` or `"tpu"`; by default this process's
        backend, and in `jp.export.save_model` each of its platforms. Programs that are compiled for
        another by `jax.export` name it here.
      tuning: which lowering is fastest: by default what `jaxprune tune` measured on this machine; a path
        to another such file; or thresholds, `{kind: [(rows, lowering), …]}`, `{}` for the defaults.

    Returns:
      A function of the same signature, whose `params` may hold compressed leaves, tied ones too;
      it jits, maps and differentiates with respect to its other inputs like `fn`. Its `explain`
      tells how leaves are used.

    Raises:
      ValueError: unknown `activations` or `platform`, thresholds that name an unknown kind or lowering,
        or an `fn` that cannot be traced.

    Warns:
      UserWarning: leaves of more than 64 MiB together are made dense in a call; a tuning file of another
        version, which is ignored.

    Example:
      >>> params = {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> run = jp.compressed(fn)
      >>> y = run(jp.quantize_tree(params, bits=4), jnp.ones((8, 64)))
      >>> y.shape, [choice.lowering for choice in run.choices]
      ((8, 32), ['int8_split'])
    """
    _checks.choice("activations", activations, (None, "int8", "float8_e4m3fn"))
    how = None if activations is None else DynamicInput(activations)
    _checks.choice("platform", platform, (None, "cpu", "gpu", "cuda", "rocm", "tpu"))
    if isinstance(tuning, Mapping):
        parsed(tuning)
    return CompressedFunction(fn, how, platform=platform, tuning=tuning)
