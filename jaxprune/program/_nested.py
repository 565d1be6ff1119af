"""Operations that hold programs: how operands become their inputs, and how to run them otherwise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxprune.program._program import Operation

Iteration = Callable[..., list[Any]]
"""An inner program as a function of its inputs."""


def split_scan(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands every iteration reads, and how many it carries; in any supported JAX version."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry = params["ft_in"].unpack()[:2]
    return len(consts.vals), len(carry.vals)


def _run_scan(params: dict[str, Any], bodies: list[Iteration], operands: list[Any]) -> list[Any]:
    n_consts, n_carry = split_scan(params)
    first = n_consts + n_carry
    consts, start, slices = operands[:n_consts], operands[n_consts:first], operands[first:]

    def step(carry: Any, xs: Any) -> Any:
        results = bodies[0](*consts, *carry, *xs)
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


def _run_while(params: dict[str, Any], bodies: list[Iteration], operands: list[Any]) -> list[Any]:
    a = params["cond_nconsts"]
    b = a + params["body_nconsts"]
    n_carry = len(params["body_jaxpr"].out_avals)  # further ones are carried for the body alone
    return jax.lax.while_loop(
        lambda carry: bodies[0](*operands[:a], *carry[:n_carry])[0],
        lambda carry: bodies[1](*operands[a:b], *carry),
        list(operands[b:]),
    )


def _run_cond(params: dict[str, Any], bodies: list[Iteration], operands: list[Any]) -> list[Any]:
    return jax.lax.switch(operands[0], bodies, *operands[1:])


def _run_shards(params: dict[str, Any], bodies: list[Iteration], operands: list[Any]) -> list[Any]:
    mapped = jax.shard_map(
        lambda *xs: tuple(bodies[0](*xs)),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=params.get("newly_manual_axes", params.get("manual_axes")),
        check_vma=params["check_vma"],
    )
    return list(mapped(*operands))


def _run_open(params: dict[str, Any], bodies: list[Iteration], operands: list[Any]) -> list[Any]:
    return bodies[0](*operands)


class Nesting(NamedTuple):
    """How a nested operation runs its programs.

    Attributes:
      hows: how each operand gets in: `"read"` as it is, `"slice"` by slice, `"carry"` from iteration to
        iteration, `"shard"` split over devices.
      operands: per program the operand that each of its inputs comes from.
      results: how each result of the last program gets out: `"read"`, `"carry"`, `"stack"`, `"branch"`
        (one of all programs) or `"shard"`.
      run: `(params, programs as functions, operands) -> results`.
    """

    hows: tuple[str, ...]
    operands: tuple[tuple[int, ...], ...]
    results: tuple[str, ...]
    run: Callable[[dict[str, Any], list[Iteration], list[Any]], list[Any]]


def nesting_of(operation: Operation) -> Nesting | None:
    """How an operation runs its programs; `None` for one that has none, or takes other operands."""
    params, n, m = operation.params, len(operation.ins), len(operation.outs)
    name, every = operation.name, tuple(range(n))
    if not operation.inner:
        return None
    if name == "scan":
        n_consts, n_carry = split_scan(params)
        hows = ("read",) * n_consts + ("carry",) * n_carry + ("slice",) * (n - n_consts - n_carry)
        results = ("carry",) * n_carry + ("stack",) * (m - n_carry)
        found = Nesting(hows, (every,), results, _run_scan)
    elif name == "while":
        a = params["cond_nconsts"]
        b = a + params["body_nconsts"]
        hows = ("read",) * b + ("carry",) * (n - b)
        operands = (every[:a] + every[b:], every[a:])
        found = Nesting(hows, operands, ("carry",) * m, _run_while)
    elif name == "cond":
        branches = (every[1:],) * len(operation.inner)
        found = Nesting(("read",) * n, branches, ("branch",) * m, _run_cond)
    elif name == "shard_map":
        found = Nesting(("shard",) * n, (every,), ("shard",) * m, _run_shards)
    else:
        found = Nesting(("read",) * n, (every,), ("read",) * m, _run_open)
    pairs = zip(operation.inner, found.operands, strict=True)
    return found if all(len(program.inputs) == len(own) for program, own in pairs) else None
