"""Sparsity schedules: functions from the training step to a sparsity in [0, 1].

Each schedule holds `initial` before step `begin` and `final` from step `end` on, and changes only
every `every` steps in between (a staircase), so that masks are rebuilt that often and no more. All
are traceable: `step` may be a Python int or a traced integer scalar. Any other callable
`step -> sparsity` serves as a schedule as well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune import _checks

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def cubic(
    final: float, *, begin: int = 0, end: int, every: int = 1, initial: float = 0.0
) -> Schedule:
    """Fast at first, slow near the end: `s_f + (s_i - s_f) (1 - t)^3`.

    `t` runs from 0 at `begin` to 1 at `end`.

    Args:
      final: sparsity from step `end` on, in [0, 1].
      begin: first step of the ramp, at least 0.
      end: last step of the ramp, above `begin`.
      every: steps between two changes, at least 1.
      initial: sparsity before `begin`, in [0, 1].

    Returns:
      A traceable function from a step to a float32 scalar.

    Raises:
      ValueError: a sparsity outside [0, 1], or `end` not above `begin`.

    Example:
      >>> schedule = jp.schedules.cubic(0.8, end=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 50, 100, 1000)]
      [0.0, 0.7, 0.8, 0.8]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878
    """
    return _ramp(lambda t: 1.0 - (1.0 - t) ** 3, final, begin, end, every, initial)


def linear(
    final: float, *, begin: int = 0, end: int, every: int = 1, initial: float = 0.0
) -> Schedule:
    """Even steps: `s_i + (s_f - s_i) t`, where `t` runs from 0 at `begin` to 1 at `end`.

    Args:
      final: sparsity from step `end` on, in [0, 1].
      begin: first step of the ramp, at least 0.
      end: last step of the ramp, above `begin`.
      every: steps between two changes, at least 1.
      initial: sparsity before `begin`, in [0, 1].

    Returns:
      A traceable function from a step to a float32 scalar.

    Raises:
      ValueError: a sparsity outside [0, 1], or `end` not above `begin`.

    Example:
      >>> schedule = jp.schedules.linear(0.8, begin=100, end=200, every=50)
      >>> [round(float(schedule(step)), 3) for step in (0, 149, 150, 200)]
      [0.0, 0.0, 0.4, 0.8]
    """
    return _ramp(lambda t: t, final, begin, end, every, initial)


def cosine(
    final: float, *, begin: int = 0, end: int, every: int = 1, initial: float = 0.0
) -> Schedule:
    """Slow at both ends: `s_i + (s_f - s_i) (1 - cos(pi t)) / 2`.

    `t` runs from 0 at `begin` to 1 at `end`.

    Args:
      final: sparsity from step `end` on, in [0, 1].
      begin: first step of the ramp, at least 0.
      end: last step of the ramp, above `begin`.
      every: steps between two changes, at least 1.
      initial: sparsity before `begin`, in [0, 1].

    Returns:
      A traceable function from a step to a float32 scalar.

    Raises:
      ValueError: a sparsity outside [0, 1], or `end` not above `begin`.

    Example:
      >>> schedule = jp.schedules.cosine(0.8, end=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 50, 100)]
      [0.0, 0.4, 0.8]
    """
    return _ramp(lambda t: (1.0 - jnp.cos(jnp.pi * t)) / 2.0, final, begin, end, every, initial)


def one_shot(final: float, *, at: int = 0, initial: float = 0.0) -> Schedule:
    """All at once: `initial` before step `at`, `final` from then on.

    Args:
      final: sparsity from step `at` on, in [0, 1].
      at: the step of the change, at least 0.
      initial: sparsity before `at`, in [0, 1].

    Returns:
      A traceable function from a step to a float32 scalar.

    Raises:
      ValueError: a sparsity outside [0, 1], or a negative step.

    Example:
      >>> schedule = jp.schedules.one_shot(0.8, at=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 99, 100)]
      [0.0, 0.0, 0.8]
    """
    _checks.fraction("final", final)
    _checks.fraction("initial", initial)
    _checks.positive_int("at", at, least=0)
    return lambda step: jnp.where(jnp.asarray(step) >= at, final, initial).astype(jnp.float32)


def _ramp(
    shape: Callable[[jax.Array], jax.Array],
    final: float,
    begin: int,
    end: int,
    every: int,
    initial: float,
) -> Schedule:
    _checks.fraction("final", final)
    _checks.fraction("initial", initial)
    _checks.positive_int("begin", begin, least=0)
    _checks.positive_int("end", end)
    _checks.positive_int("every", every)
    if end <= begin:
        raise ValueError(f"end: expected a step after begin={begin}, got {end}")

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step)
        stair = begin + (step - begin) // every * every
        t = jnp.clip((stair - begin) / (end - begin), 0.0, 1.0).astype(jnp.float32)
        ramp = initial + (final - initial) * shape(t)
        # `end` need not lie on the staircase, and the last value must be exact
        return jnp.where(step >= end, final, ramp).astype(jnp.float32)

    return schedule
