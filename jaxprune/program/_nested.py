"""Running operations that hold programs (loops, branches, shards) with other inner programs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxpr_as_fun

from jaxprune.program._program import Operation

Turn = Callable[..., list[Any]]


def split_scan(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands every turn reads, and how many it carries; in any supported JAX version."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry = params["ft_in"].unpack()[:2]
    return len(consts.vals), len(carry.vals)


def _run_scan(params: dict[str, Any], turns: list[Turn], operands: list[Any]) -> list[Any]:
    n_consts, n_carry = split_scan(params)
    first = n_consts + n_carry
    consts, start, slices = operands[:n_consts], operands[n_consts:first], operands[first:]

    def step(carry: Any, xs: Any) -> Any:
        results = turns[0](*consts, *carry, *xs)
        return results[:n_carry], results[n_carry:]

    carry, stacked = jax.lax.scan(
        step,
        list(start),
        list(slices),
        length=jax.tree.leaves(slices)[0].shape[0] if slices else params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _run_while(params: dict[str, Any], turns: list[Turn], operands: list[Any]) -> list[Any]:
    a = params["cond_nconsts"]
    b = a + params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: turns[0](*operands[:a], *carry)[0],
        lambda carry: turns[1](*operands[a:b], *carry),
        list(operands[b:]),
    )


def _run_cond(params: dict[str, Any], turns: list[Turn], operands: list[Any]) -> list[Any]:
    return jax.lax.switch(operands[0], turns, *operands[1:])


def _run_shards(params: dict[str, Any], turns: list[Turn], operands: list[Any]) -> list[Any]:
    mapped = jax.shard_map(
        lambda *xs: tuple(turns[0](*xs)),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=params.get("newly_manual_axes", params.get("manual_axes")),
        check_vma=params["check_vma"],
    )
    return list(mapped(*operands))


RUN: dict[str, Callable[[dict[str, Any], list[Turn], list[Any]], list[Any]]] = {
    "scan": _run_scan,
    "while": _run_while,
    "cond": _run_cond,
    "shard_map": _run_shards,
}
"""The operation again, with other inner programs: `(params, inner programs, operands) -> results`."""


def carries_of(operation: Operation, operands: list[Any]) -> jax.Array:
    """The largest floating carry of a scan, before each turn and after the last: (turns + 1, ...)."""
    n_consts, n_carry = split_scan(operation.params)
    consts, first = operands[:n_consts], n_consts + n_carry
    start, slices = list(operands[n_consts:first]), list(operands[first:])
    floats = [i for i, x in enumerate(start) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)]
    main = max(floats, key=lambda i: start[i].size)
    turn = jaxpr_as_fun(operation.params["jaxpr"])

    def step(carry: Any, xs: Any) -> Any:
        return list(turn(*consts, *carry, *xs)[:n_carry]), carry[main]

    last, before = jax.lax.scan(
        step, start, slices, length=operation.params["length"], reverse=operation.params["reverse"]
    )
    if operation.params["reverse"]:
        return jax.numpy.concatenate([last[main][None], before])
    return jax.numpy.concatenate([before, last[main][None]])


class NestedRun(NamedTuple):
    """A loop or branch that may run with other inner programs.

    Attributes:
      jaxprs: its inner programs.
      reads: whether every turn only reads an operand, given its position.
      slices: whether every turn gets a slice of it.
      run: `(params, inner programs as functions, operands) -> results`.
    """

    jaxprs: list[Any]
    reads: Callable[[int], bool]
    slices: Callable[[int], bool]
    run: Callable[[dict[str, Any], list[Turn], list[Any]], list[Any]]


def nested_run(operation: Operation) -> NestedRun | None:
    """How to run an operation with other inner programs; `None` for one that has none."""
    name, params = operation.primitive.name, operation.params
    if name == "scan":
        n_consts, n_carry = split_scan(params)
        first = n_consts + n_carry
        return NestedRun([params["jaxpr"]], lambda i: i < n_consts, lambda i: i >= first, _run_scan)
    if name == "while":
        read = params["cond_nconsts"] + params["body_nconsts"]
        jaxprs = [params["cond_jaxpr"], params["body_jaxpr"]]
        return NestedRun(jaxprs, lambda i: i < read, lambda i: False, _run_while)
    if name == "cond":
        return NestedRun(list(params["branches"]), lambda i: i > 0, lambda i: False, _run_cond)
    return None
