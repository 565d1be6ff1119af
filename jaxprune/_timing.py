"""Timing in turns: what is compared runs alternately, and what else the machine does hits all alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def in_turns(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 20, budget: float = 2.0
) -> dict[str, np.ndarray]:
    """Seconds of each call, (rounds,), measured one after the other in each round.

    Args:
      calls: what to time, by name; each runs once before, to compile.
      rounds: at most so many rounds, and at least two.
      budget: seconds after which no further round starts.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, begin = [*calls], time.perf_counter()
    for number in range(rounds):
        for name in order[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
        if number and time.perf_counter() - begin > budget:
            break
    return {name: np.array(values) for name, values in seconds.items()}
