"""`scan`: recurrent networks, whose carry is coupled with itself, and stacked layers.

What a body reads from outside, carries and maps over keeps its axes, except the axis that is scanned. The
body is walked with the ids of its operands; what it carries out is equal to what it carried in. Whether a
carried value is zero when masked is assumed and then checked, until it holds for every turn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.graph._axes import Axes, no_rule
from jaxprune.graph._program import Program, open_program
from jaxprune.graph._units import FROZEN, Facts

Walk = Callable[[Program, list[Axes], Facts], tuple[Axes, ...]]


class Body(NamedTuple):
    """A loop's body.

    Attributes:
      program: one turn: `(*consts, *carry, *slices) -> (*carry, *slices)`.
      consts: number of operands that every turn reads.
      carry: number of carried values.
    """

    program: Program
    consts: int
    carry: int


def body_of(params: dict[str, Any]) -> Body:
    """The body of a scan, from the parameters of any supported JAX version."""
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:
        parts = params["ft_in"].unpack()
        consts, carry = (len(part.vals) for part in parts[:2])
    return Body(open_program(params["jaxpr"]), consts, carry)


def scan_rule(walk: Walk) -> Callable[..., list[Axes]]:
    """The rule for `scan`, given the walk over a program."""

    def rule(
        facts: Facts, params: Any, source: str, ins: list[Axes], outs: list[tuple[int, ...]]
    ) -> list[Axes]:
        body = body_of(params)
        first = body.consts + body.carry
        if len(body.program.inputs) != len(ins) or not params["length"]:
            return no_rule(facts, params, source, ins, outs, "scan")
        for x in ins[first:]:
            facts.freeze(x.ids[0], f"scanned over at {source}")
        slices = [Axes(x.ids[1:], x.zero[1:], x.value) for x in ins[first:]]
        carried = ins[body.consts : first]
        carry = [_carried(facts, x) for x in carried]
        while True:
            axes = walk(body.program, [*ins[: body.consts], *carry, *slices], facts)
            results = [axes[i] for i in body.program.outputs]
            for before, start, after in zip(carry, carried, results, strict=False):
                for a, b, c in zip(before.ids, start.ids, after.ids, strict=True):
                    facts.equate(a, b)
                    facts.equate(a, c)
            weaker = [
                Axes(x.ids, tuple(a & (b | y.is_zero) for a, b in zip(x.zero, y.zero, strict=True)))
                for x, y in zip(carry, results[: body.carry], strict=True)
            ]
            if all(
                (a == b).all()
                for x, y in zip(carry, weaker, strict=True)
                for a, b in zip(x.zero, y.zero, strict=True)
            ):
                break
            carry = weaker
        facts.bodies[facts.place] = (body, axes)
        length = params["length"]
        stacked = [
            Axes((np.full(length, FROZEN), *x.ids), (np.zeros(length, bool), *x.zero))
            for x in results[body.carry :]
        ]
        return [*carry, *stacked]

    return rule


def _carried(facts: Facts, start: Axes) -> Axes:
    """A carried value: fresh ids, and zero where the start is. A known number is known no more."""
    ids = tuple(facts.fresh(n) if n > 1 else np.full(n, FROZEN) for n in start.shape)
    return Axes(ids, tuple(z | start.is_zero for z in start.zero))


def run_scan(
    params: dict[str, Any], body: Body, turn: Callable[..., Any], operands: list[Any]
) -> Any:
    """A scan with another turn: `turn(*operands)` returns the flat results of one."""
    first = body.consts + body.carry
    consts, start, slices = operands[: body.consts], operands[body.consts : first], operands[first:]

    def step(carry: Any, xs: Any) -> Any:
        results = turn(*consts, *carry, *xs)
        return results[: body.carry], results[body.carry :]

    carry, stacked = jax.lax.scan(
        step,
        list(start),
        list(slices),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]
