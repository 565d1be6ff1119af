"""A traced function as a list of operations on numbered values.

`jit`, `remat`, `custom_jvp` and the like are opened, so that whoever walks the list sees only primitives
that compute, in order. `custom_vjp`, whose gradient is its own, loops and branches stay operations, with
programs of their own; numbers of values are unique throughout, inner programs included.
"""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxprune import _trees
from jaxprune._types import is_compressed
from jaxprune.program._inputs import inputs_of
from jaxprune.program._primitives import Kind, primitive

_NOT_THE_USERS = ("/jax/", "/flax/", "/jaxprune/program/", "/jaxprune/graph/")


@dataclass(frozen=True)
class Operation:
    """One primitive applied.

    Attributes:
      primitive: the JAX primitive.
      params: its static parameters.
      ins: value numbers of the operands.
      outs: value numbers of the results.
      source: `file:line (function)` where the user's program called it.
      is_relu: it is the maximum inside `jax.nn.relu`, whose derivative at 0 is 0.
      effects: it does something besides computing its results, such as printing.
      scope: the name scopes that it lies in, '/'-joined.
      inner: its programs, where it has any: the body of a loop, the branches of a condition.
    """

    primitive: Any
    params: dict[str, Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    source: str
    is_relu: bool = False
    effects: bool = False
    scope: str = ""
    inner: "tuple[Program, ...]" = ()

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.primitive.name

    @property
    def is_link(self) -> bool:
        """Whether it only ties an inner program to what is around it, see `Flow`."""
        return not hasattr(self.primitive, "bind")


@dataclass
class Program:
    """A function as operations on numbered values.

    Attributes:
      avals: shape and dtype of each value, by number; inner programs share it.
      constants: arrays and scalars known at tracing time, by value number.
      inputs: value numbers of the flattened arguments.
      operations: in order of execution.
      outputs: value numbers of the flattened results.
      out_tree: structure of the results.
    """

    avals: list[Any] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    out_tree: Any = None


def trace_program(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Program:
    """Traces `fn` once, abstractly, and flattens it. Arguments may be `jax.ShapeDtypeStruct`; compressed
    leaves of the parameters count as the dense arrays that they stand for.

    The inputs of the program are the leaves of `params` and the arrays of `inputs_of(args, kwargs)`.

    Raises:
      TypeError: inputs that `fn` needs are missing; parameters that are no arrays.
      ValueError: `fn` needs the value of an array while it is traced.
    """
    try:
        inspect.signature(fn).bind(params, *args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"fn: {error}; give the example inputs after params, as fn is called: "
            "trace(fn, params, *args)"
        ) from error
    except ValueError:  # some callables have no signature
        pass
    inputs = inputs_of(args, kwargs)
    _check_arrays(params)
    params = jax.tree.map(_trees.abstract, params, is_leaf=is_compressed)

    def of_arrays(params: Any, arrays: list[Any]) -> Any:
        args, kwargs = inputs.rebuild(arrays)
        return fn(params, *args, **kwargs)

    try:
        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(params, inputs.arrays)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise ValueError(
            f"fn: cannot be traced: {_line_of(error)} needs the value of an array "
            f"({type(error).__name__}); use jnp.where or jax.lax.cond there, or bind what is static with "
            "functools.partial"
        ) from error
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        name = str(error).partition("unbound axis name: ")[2].partition(".")[0].strip()
        raise ValueError(
            f"fn: {_line_of(error)} sums over the named axis {name!r}, which nothing binds; trace the "
            f"function that does: jax.vmap(fn, in_axes=(None, 0), axis_name={name!r}) with a further "
            "leading axis of the inputs, or jax.shard_map over a mesh with such an axis"
        ) from error
    program = Program(out_tree=jax.tree.structure(shapes))
    program.inputs = [_new(program, var.aval) for var in closed.jaxpr.invars]
    program.outputs = _open(program, closed, program.inputs)
    _drop_unused(program)
    return program


def _check_arrays(params: Any) -> None:
    for path, leaf in zip(*_trees.flatten(params)[:2], strict=True):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"params: leaf {path!r} is a {type(leaf).__name__}, no array: give the arrays, and bind "
                "the rest to the function. For an Equinox module: params, static = eqx.partition(model, "
                "eqx.is_array); fn = lambda params, x: eqx.combine(params, static)(x)"
            )


def _drop_unused(program: Program) -> None:
    """Leaves out what neither the outputs nor the outside world notice."""
    needed = set(program.outputs)
    kept = []
    for operation in reversed(program.operations):
        if operation.effects or needed.intersection(operation.outs):
            kept.append(operation)
            needed.update(operation.ins)
    program.operations = kept[::-1]
    needed |= {*program.inputs, *(i for op in kept for i in op.outs)}
    program.constants = {i: value for i, value in program.constants.items() if i in needed}


def _inner(program: Program, eqn: Any) -> tuple[Program, ...]:
    """The programs of a nested operation, their values numbered with those around."""
    known, found = primitive(eqn.primitive.name), []
    if known.kind is Kind.NESTED:
        for name in known.programs:
            given = eqn.params[name]
            for jaxpr in given if isinstance(given, tuple) else (given,):
                inner = Program(program.avals)
                inner.inputs = [_new(inner, var.aval) for var in _invars(jaxpr)]
                inner.outputs = _open(inner, jaxpr, inner.inputs)
                found.append(inner)
    return tuple(found)


def _new(program: Program, aval: Any) -> int:
    program.avals.append(aval)
    return len(program.avals) - 1


def _constant(program: Program, value: Any, aval: Any) -> int:
    number = _new(program, aval)
    program.constants[number] = value
    return number


def _open(
    program: Program,
    closed: ClosedJaxpr | Jaxpr,
    ins: list[int],
    *,
    is_relu: bool = False,
    scope: str = "",
    called_at: str = "",
) -> list[int]:
    """`called_at`: where the user called a function of a library that is opened; traces of those are
    kept, and name the place of their first call.
    """
    jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
    consts = closed.consts if isinstance(closed, ClosedJaxpr) else []
    env: dict[Any, int] = dict(zip(jaxpr.invars, ins, strict=True))
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        env[var] = _constant(program, value, var.aval)

    def read(atom: Any) -> int:
        if isinstance(atom, Literal):
            return _constant(program, atom.val, atom.aval)
        return env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        around = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        known = primitive(eqn.primitive.name)
        inner = eqn.params.get(known.programs[0]) if known.kind is Kind.OPENED else None
        if inner is not None and len(_invars(inner)) == len(operands):
            named = eqn.params.get("name") == "relu"
            place = called_at or (_source(eqn) if _of_library(inner) else "")
            results = _open(
                program, inner, operands, is_relu=is_relu or named, scope=around, called_at=place
            )
        else:
            results = [_new(program, var.aval) for var in eqn.outvars]
            program.operations.append(
                Operation(
                    eqn.primitive,
                    eqn.params,
                    tuple(operands),
                    tuple(results),
                    called_at or _source(eqn),
                    is_relu and eqn.primitive.name == "max",
                    bool(eqn.effects),
                    around,
                    _inner(program, eqn),
                )
            )
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_library(inner: Any) -> bool:
    """Whether an inner program is that of a function of JAX or Flax."""
    jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    defined = getattr(getattr(jaxpr, "debug_info", None), "func_src_info", None) or ""
    return any(part in defined for part in _NOT_THE_USERS)


def _invars(jaxpr: Any) -> Any:
    return jaxpr.jaxpr.invars if isinstance(jaxpr, ClosedJaxpr) else jaxpr.invars


def _line_of(error: BaseException) -> str:
    """The last line of the user's program that led to an error."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in _NOT_THE_USERS)
    ]
    return (
        f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})"
        if frames
        else "a line of it"
    )


def _source(eqn: Any) -> str:
    stack = getattr(eqn.source_info, "traceback", None)
    if stack is None:
        return ""
    for frame in stack.frames:
        if not any(part in frame.file_name for part in _NOT_THE_USERS):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""
