"""Timing in turns: what is compared runs alternately in one process, and medians are divided."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jaxprune as jp


def in_turns(
    calls: dict[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    of: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds of each call, in a new random order each round (what ran before leaves traces).

    Every call runs once before, to compile and to warm up. `of`: what is taken of the rounds.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls.items()), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for name, call in order:
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: of(values) for name, values in seconds.items()}


def stepper(tx, loss, params, x):
    """A call that makes one step, its state donated as in a real loop."""
    state = tx.init(params)

    def step(params, state):
        is_dense = isinstance(state, jp.optim.ForwardState)  # then the network runs on less
        seen = jp.optim.sparse_params(state, params) if is_dense else params
        updates, state = tx.update(jax.grad(loss)(seen, x), state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), state]

    def call():
        held[:] = run(*held)
        return held[0]

    return call


def show(title: str, seconds: dict[str, float], base: str) -> None:
    """Prints a table of times and of ratios to `base`."""
    table = Table(title=title)
    table.add_column("what")
    table.add_column("ms", justify="right")
    table.add_column(f"ratio to {base}", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{1e3 * value:.2f}", f"{value / seconds[base]:.2f}")
    Console(width=100).print(table)
