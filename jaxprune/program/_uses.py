"""What a program does with each parameter: an abstract run that follows the axes of parameters.

A value that is computed from parameters and constants alone is a parameter under another form
(transposed, scaled, one layer of a stack); each *view* on it tells which axes of which leaf make up its
axes. Where such a value meets data, in a product, a look-up or entry by entry, that is a use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxprune import _trees
from jaxprune._types import Params, PyTree
from jaxprune._uses import UseKind, Uses
from jaxprune.program._nested import nesting_of
from jaxprune.program._primitives import Kind, primitive
from jaxprune.program._program import Operation, Program, trace_program
from jaxprune.program._roles import Use, is_weight, joined, use_of
from jaxprune.program._views import (
    CONSTANT,
    DATA,
    NO_AXES,
    Value,
    View,
    covers,
    mixed,
    moved,
    multiplied,
    resized,
    sliced,
    with_axis,
    without_groups,
)


def uses(fn: Callable[..., Any], params: Params, *args: Any, **kwargs: Any) -> PyTree:
    """Find out what a function does with each parameter, and with each of its axes.

    The function is traced abstractly, once; nothing is computed. Several uses of one leaf are joined: a
    product says more than a look-up (tied embeddings), and both more than an elementwise operation.

    Args:
      fn: any traceable `fn(params, *args, **kwargs)`.
      params: its parameters; compressed leaves count as what they stand for.
      *args, **kwargs: example inputs; only shapes matter, `jax.ShapeDtypeStruct` will do.

    Returns:
      Tree like `params` with a `jaxprune.Uses` for each leaf: for `uses=` of whatever chooses leaves or
      axes (`jp.quantize_tree`, `jp.prune_tree`, `jp.cluster_tree`, …).

    Raises:
      TypeError, ValueError: see `jp.trace`.

    Example:
      >>> params = {"layers": jnp.ones((3, 8, 8)), "embed": jnp.ones((10, 8))}
      >>> def fn(p, tokens):
      ...     step = lambda h, w: (jnp.tanh(h @ w), None)
      ...     return jax.lax.scan(step, p["embed"][tokens], p["layers"])[0]
      >>> found = jp.uses(fn, params, jnp.zeros((2, 4), int))
      >>> found["layers"].stacked, found["layers"].contracted, found["embed"].kind
      ((-3,), (-2,), 'look-up')
    """
    _, leaves, treedef = _trees.flatten(params)
    program = trace_program(fn, params, *args, **kwargs)
    return treedef.unflatten(uses_of_program(program, len(leaves)))


def uses_of_program(program: Program, count: int) -> list[Uses]:
    """What a program does with each of its first inputs, in order; `count`: of the parameters."""
    walk = _Walk()
    shapes = [tuple(program.avals[number].shape) for number in program.inputs[:count]]
    own = [Value((View.of(i, shape),)) for i, shape in enumerate(shapes)]
    data = [DATA] * (len(program.inputs) - len(own))
    for value in walk.run(program, [*own, *data]):
        walk.note(value, "other")
    found: list[list[Use]] = [[] for _ in own]
    for use in walk.uses.values():
        found[use.leaf].append(use)
    for use in walk.among_parameters.values():
        if not any(is_weight(known) for known in found[use.leaf]):
            found[use.leaf].append(use)
    return [joined(each, shape) for each, shape in zip(found, shapes, strict=True)]


@dataclass
class _Walk:
    """An abstract run: what each operation makes of values, and the uses that it finds.

    Attributes:
      uses: of parameters with data, each once.
      among_parameters: products of parameters with each other.
    """

    uses: dict[Any, Use] = field(default_factory=dict)
    among_parameters: dict[Any, Use] = field(default_factory=dict)

    def run(self, program: Program, inputs: Sequence[Value]) -> list[Value]:
        values = dict.fromkeys(program.constants, CONSTANT)
        values |= dict(zip(program.inputs, inputs, strict=True))
        for operation in program.operations:
            ins = [values[i] for i in operation.ins]
            avals = [program.avals[i] for i in (*operation.ins, *operation.outs)]
            shapes = [tuple(getattr(aval, "shape", ())) for aval in avals]
            n = len(ins)
            if any(x.views for x in ins):
                outs = self._apply(operation, ins, shapes[:n], shapes[n:])
            else:
                outs = [mixed(ins)] * len(operation.outs)
            values.update(zip(operation.outs, outs, strict=True))
        return [values[i] for i in program.outputs]

    def note(self, value: Value, kind: UseKind, source: str = "", **axes: Any) -> None:
        """Notes a use of every leaf that a value of parameters shows; of axes of the value."""
        if not value.is_data:
            for view in value.views:
                self._note(view, kind, source, **axes)

    def _note(self, view: View, kind: UseKind, source: str, **axes: Any) -> None:
        use = use_of(view, kind, source, **axes)
        self.uses.setdefault(use[:-1], use)

    def _apply(
        self,
        operation: Operation,
        ins: list[Value],
        shapes: list[tuple[int, ...]],
        outs: list[tuple[int, ...]],
    ) -> list[Value]:
        name = operation.name
        known = primitive(name)
        if known.kind is Kind.NESTED:
            return self._nested(operation, ins, outs)
        if known.kind is Kind.PRODUCT:
            return [self._product(operation, ins, shapes)]
        if known.kind in (Kind.IDENTITY, Kind.CAST, Kind.COLLECTIVE) and len(ins) == len(outs):
            return list(ins)
        if name in ("gather", "dynamic_slice"):
            return [self._picked(operation, ins, shapes[0], outs[0])]
        if known.kind in (Kind.VIEW, Kind.PART, Kind.REORDER, Kind.JOIN, Kind.REDUCTION):
            found = moved(name, operation.params, ins, shapes, outs)
            if found is not None and any(axis for x in found for v in x.views for axis in v.axes):
                return found
        if known.kind is Kind.ELEMENTWISE:
            return [self._elementwise(operation, ins, shapes, outs[0])]
        return self._lost(operation, ins, len(outs))

    def _lost(self, operation: Operation, ins: list[Value], count: int) -> list[Value]:
        """An operation after which axes are known no more."""
        for value in ins:
            self.note(value, "other", operation.source)
        return [DATA if any(x.is_data for x in ins) else CONSTANT] * count

    def _product(
        self, operation: Operation, ins: list[Value], shapes: list[tuple[int, ...]]
    ) -> Value:
        params = operation.params
        if operation.name == "dot_general":
            contract, batch = params["dimension_numbers"]
            ranks = [len(shape) for shape in shapes]
            if not any(x.is_data for x in ins):
                return self._among_parameters(operation.source, ins, ranks, contract, batch)
            for side in (0, 1):
                self._factor(operation, ins[side], ranks[side], contract[side], batch[side])
        elif operation.name == "conv_general_dilated":
            numbers, value = params["dimension_numbers"].rhs_spec, ins[1]
            groups = params["feature_group_count"] * params["batch_group_count"]
            for view in () if value.is_data else value.views:
                inner, stacked = without_groups(view, numbers[0], groups)
                self._note(
                    replace(inner, stacked=inner.stacked | stacked),
                    "convolution",
                    operation.source,
                    contracted=numbers[1:2],
                    free=numbers[:1],
                    spatial=numbers[2:],
                )
            self.note(ins[0], "other", operation.source)
        else:  # ragged products: (rows, contracted) by (groups, contracted, free)
            rank = len(shapes[1])
            self.note(ins[0], "other", operation.source)
            self._factor(operation, ins[1], rank, (rank - 2,), tuple(range(rank - 2)))
        return mixed(ins)

    def _among_parameters(
        self, source: str, ins: list[Value], ranks: list[int], contract: Any, batch: Any
    ) -> Value:
        """A product of parameters: what it is for shows where its result meets data."""
        free = [
            [i for i in range(rank) if i not in (*c, *b)]
            for rank, c, b in zip(ranks, contract, batch, strict=True)
        ]
        views = []
        for side, value in enumerate(ins):
            rows = [free[0], [-1] * len(free[1])] if side == 0 else [[-1] * len(free[0]), free[1]]
            out = [*batch[side], *rows[0], *rows[1]]
            views += multiplied(value.views, contract[side], batch[side], out)
            for view in value.views:
                use = use_of(view, "product", source, batch[side], contract[side], free[side])
                self.among_parameters.setdefault(use[:-1], use)
        return Value(tuple(dict.fromkeys(views)))

    def _factor(
        self,
        operation: Operation,
        value: Value,
        rank: int,
        contracted: Sequence[int],
        batch: Sequence[int],
    ) -> None:
        """One operand of a product."""
        axes = {
            "stacked": tuple(batch),
            "contracted": tuple(contracted),
            "free": tuple(i for i in range(rank) if i not in (*contracted, *batch)),
        }
        self.note(value, "product", operation.source, **axes)
        for view in value.views if value.is_data else ():  # parameters picked for each example
            if view.picked and view.picked <= set(batch):
                self.uses.pop(view.from_look_up, None)
                self._note(view, "product", operation.source, **axes)

    def _elementwise(
        self,
        operation: Operation,
        ins: list[Value],
        shapes: list[tuple[int, ...]],
        out: tuple[int, ...],
    ) -> Value:
        has_data = any(x.is_data for x in ins)
        views: list[View] = []
        for value, shape in zip(ins, shapes, strict=True):
            if has_data or shape != out:
                self.note(value, "elementwise", operation.source, free=range(len(shape)))
            else:
                views += value.views
        whole = [view for view in views if view.summed or covers(view, out)] or views
        for view in views:
            if view not in whole:  # a scale or a shift of another parameter
                self._note(view, "elementwise", operation.source, free=range(len(out)))
        return Value(tuple(dict.fromkeys(whole)), has_data)

    def _picked(
        self,
        operation: Operation,
        ins: list[Value],
        shape: tuple[int, ...],
        out: tuple[int, ...],
    ) -> Value:
        """A slice or a look-up by computed indices; both are views where parameters are read."""
        table, index = ins[0], ins[1:]
        if not table.views:
            return mixed(ins)
        sizes = operation.params["slice_sizes"]
        if operation.name == "dynamic_slice":
            one = [i for i, (n, k) in enumerate(zip(sizes, shape, strict=True)) if k > n == 1]
            return table.mapped(lambda view: sliced(view, one, out))
        numbers = operation.params["dimension_numbers"]
        within = tuple(i for i, n in enumerate(sizes) if n < shape[i])
        offsets = [i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims]
        offsets = [i for i in offsets if i not in numbers.operand_batching_dims]
        beside = [i for i in range(len(out)) if i not in numbers.offset_dims]
        at = dict(zip(numbers.offset_dims, offsets, strict=True))
        is_look_up = any(x.is_data for x in index) and bool(beside)

        def view_of(view: View) -> View:
            axes = tuple(
                view.axes[at[i]] if i in at and out[i] > 1 else () for i in range(len(out))
            )
            picked = view.at(within)
            if not is_look_up:
                return replace(view, axes=axes, stacked=view.stacked | picked)
            factors = tuple(f for i in within for f in view.axes[i])
            axes = tuple(factors if i in beside[:1] else x for i, x in enumerate(axes))
            use = Use(
                view.leaf, "look-up", view.stacked, NO_AXES, picked - view.stacked, NO_AXES,
                operation.source,
            )  # fmt: skip
            self.uses.setdefault(use[:-1], use)
            return replace(view, axes=axes, picked=frozenset(beside[:1]), from_look_up=use[:-1])

        found = table.mapped(view_of)
        return replace(found, is_data=table.is_data or is_look_up)

    def _nested(
        self, operation: Operation, ins: list[Value], outs: list[tuple[int, ...]]
    ) -> list[Value]:
        nesting = nesting_of(operation)
        if nesting is None:
            return self._lost(operation, ins, len(outs))
        ready = [
            x.mapped(lambda view: view.dropping([0])) if how == "slice" else x
            for x, how in zip(ins, nesting.hows, strict=True)
        ]
        carries = [i for i, how in enumerate(nesting.hows) if how == "carry"]
        while True:
            results = [
                self.run(
                    program,
                    [
                        _local(ready[i], program, n)
                        for i, n in zip(own, program.inputs, strict=True)
                    ],
                )
                for program, own in zip(operation.inner, nesting.operands, strict=True)
            ]
            after = [
                mixed([ready[i], result]) for i, result in zip(carries, results[-1], strict=False)
            ]
            if after == [ready[i] for i in carries]:
                break
            for i, value in zip(carries, after, strict=True):
                ready[i] = value
        # one result of every branch, or of the last program
        found = [
            mixed([each[i] for each in results]) if how == "branch" else results[-1][i]
            for i, how in enumerate(nesting.results)
        ]
        return [
            value.mapped(with_axis) if how == "stack" else value
            for value, how in zip(found, nesting.results, strict=True)
        ]


def _local(value: Value, program: Program, number: int) -> Value:
    """A value as an inner program has it: on one device, its part."""
    shape = tuple(getattr(program.avals[number], "shape", ()))
    return value.mapped(lambda view: resized(view, shape))
