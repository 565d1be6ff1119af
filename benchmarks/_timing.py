"""Timing in turns: what is compared runs alternately in one process, and medians are divided."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table


def in_turns(calls: dict[str, Callable[[], Any]], *, rounds: int = 9) -> dict[str, float]:
    """Median seconds of each call, in a new random order each round (what ran before leaves traces).

    Every call runs once before, to compile and to warm up.
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
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, seconds: dict[str, float], base: str) -> None:
    """Prints a table of times and of ratios to `base`."""
    table = Table(title=title)
    table.add_column("what")
    table.add_column("ms", justify="right")
    table.add_column(f"ratio to {base}", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{1e3 * value:.2f}", f"{value / seconds[base]:.2f}")
    Console(width=100).print(table)
