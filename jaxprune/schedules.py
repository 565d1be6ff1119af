"""Schedules: functions from the training step to a sparsity in [0, 1], a temperature, or a phase.

A schedule of sparsity holds `initial` before step `begin` and `final` from step `end` on, and changes
only every `every` steps in between (a staircase), so that masks are rebuilt that often and no more. All
are traceable: `step` may be a Python int or a traced integer scalar. Any other callable
`step -> sparsity` serves as a schedule as well.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune import _checks

__all__ = [
    "alternating",
    "annealed",
    "between",
    "cosine",
    "cubic",
    "linear",
    "one_shot",
    "polynomial",
    "scaled",
]

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


def polynomial(
    final: float, *, begin: int = 0, end: int, every: int = 1, power: int = 3
) -> Schedule:
    """The ramp of jaxpruner: `s (1 - (1 - p)^power)` with `p = (step + 1 - begin) / (end - begin)`.

    It changes at multiples of `every` within `[begin, end]`, one step ahead of `cubic`, and stays as it
    is after `end`.

    Args:
      final: the sparsity that the ramp reaches, in [0, 1].
      begin: first step of the ramp, at least 0.
      end: last step at which the sparsity changes, at least `begin`; at `begin`, one jump.
      every: it changes at multiples of this, at least 1.
      power: of the remaining distance, at least 1.

    Returns:
      A traceable function from a step to a float32 scalar.

    Raises:
      ValueError: a sparsity outside [0, 1], `end` before `begin`, or no multiple of `every` in between.

    Example:
      >>> schedule = jp.schedules.polynomial(0.8, begin=10, end=20, every=5)
      >>> [round(float(schedule(step)), 3) for step in (9, 10, 14, 15, 20, 100)]
      [0.0, 0.217, 0.217, 0.749, 0.8, 0.8]
    """
    _checks.fraction("final", final)
    _checks.positive_int("begin", begin, least=0)
    _checks.positive_int("end", end, least=0)
    _checks.positive_int("every", every)
    _checks.positive_int("power", power)
    if end < begin:
        raise ValueError(f"end: expected a step not before begin={begin}, got {end}")
    first, last = -(-begin // every) * every, end // every * every
    if last < first:
        raise ValueError(
            f"every: no multiple of {every} lies in [begin, end] = [{begin}, {end}]; choose another"
        )

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step)
        at = jnp.minimum(step // every * every, last)
        done = jnp.clip(at + 1 - begin, 0, end - begin).astype(jnp.float32)
        p = done / jnp.float32(end - begin) if end > begin else jnp.float32(1)
        value = final * (1.0 - (1.0 - p) ** power)
        return jnp.where(step >= first, value, 0.0).astype(jnp.float32)

    return schedule


def scaled(schedule: Schedule, budget: Any) -> Callable[[Any], Any]:
    """A schedule for each leaf: `schedule(step)` times the leaf's fraction.

    Args:
      schedule: `step -> number in [0, 1]`.
      budget: tree of fractions like the parameters, such as `jp.budgets.erk(params, 0.9)`.

    Returns:
      A function from a step to a tree of float32 scalars.

    Example:
      >>> ramp = jp.schedules.linear(1.0, end=10)
      >>> jax.tree.map(float, jp.schedules.scaled(ramp, {"a": 0.5, "b": 0.0})(5))
      {'a': 0.25, 'b': 0.0}
    """
    return lambda step: jax.tree.map(
        lambda fraction: jnp.asarray(schedule(step) * fraction, jnp.float32), budget
    )


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


def annealed(
    final: float, *, initial: float = 1.0, begin: int = 0, end: int, method: str = "exponential"
) -> Schedule:
    """A temperature that falls (or rises) from `initial` at step `begin` to `final` at step `end`.

    Args:
      final: temperature from step `end` on, above 0.
      initial: temperature until step `begin`, above 0.
      begin: first step of the change, at least 0.
      end: last step of the change, above `begin`.
      method: `"exponential"` (the same factor each step), `"linear"` or `"cosine"`.

    Returns:
      A traceable function from a step to a float32 scalar.

    Raises:
      ValueError: a temperature that is not above 0, an unknown method, or `end` not above `begin`.

    Example:
      >>> schedule = jp.schedules.annealed(0.01, end=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 50, 100, 1000)]
      [1.0, 0.1, 0.01, 0.01]

    Reference: Jang et al., "Categorical Reparameterization with Gumbel-Softmax", 2016,
    https://arxiv.org/abs/1611.01144
    """
    _checks.positive("final", final)
    _checks.positive("initial", initial)
    _checks.choice("method", method, ("exponential", "linear", "cosine"))
    _check_range(begin, end)

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        t = jnp.clip((jnp.asarray(step) - begin) / (end - begin), 0.0, 1.0).astype(jnp.float32)
        if method == "exponential":
            return initial * (final / initial) ** t
        t = t if method == "linear" else (1.0 - jnp.cos(jnp.pi * t)) / 2.0
        return initial + (final - initial) * t

    return schedule


def between(begin: int, *, end: int | None = None) -> Callable[[Any], Array]:
    """True from step `begin` on, and before step `end`: a phase of training.

    Args:
      begin: first step, at least 0.
      end: the step after the last; none for ever.

    Returns:
      A traceable function from a step to a bool scalar, such as `jp.optim.phased` takes.

    Raises:
      ValueError: a negative step, or `end` not above `begin`.

    Example:
      >>> active = jp.schedules.between(10, end=20)
      >>> [bool(active(step)) for step in (9, 10, 19, 20)]
      [False, True, True, False]
    """
    _checks.positive_int("begin", begin, least=0)
    if end is not None:
        _check_range(begin, end)

    def active(step: Any) -> Array:
        step = jnp.asarray(step)
        after = step >= begin
        return after if end is None else after & (step < end)

    return active


def alternating(on: int, off: int, *, begin: int = 0) -> Callable[[Any], Array]:
    """True for `on` steps, False for `off`, and again, from step `begin` on; False before.

    Args:
      on: steps of a phase that is on, at least 1.
      off: steps between two such phases, at least 1.
      begin: first step, at least 0.

    Returns:
      A traceable function from a step to a bool scalar, such as `jp.optim.phased` takes.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> gates = jp.schedules.alternating(2, 3, begin=1)
      >>> [int(gates(step)) for step in range(8)]
      [0, 1, 1, 0, 0, 0, 1, 1]
    """
    _checks.positive_int("on", on)
    _checks.positive_int("off", off)
    _checks.positive_int("begin", begin, least=0)

    def active(step: Any) -> Array:
        passed = jnp.asarray(step) - begin
        return (passed >= 0) & (passed % (on + off) < on)

    return active


def _check_range(begin: int, end: int) -> None:
    _checks.positive_int("begin", begin, least=0)
    _checks.positive_int("end", end)
    if end <= begin:
        raise ValueError(f"end: expected a step after begin={begin}, got {end}")


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
    _check_range(begin, end)
    _checks.positive_int("every", every)

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step)
        stair = begin + (step - begin) // every * every
        t = jnp.clip((stair - begin) / (end - begin), 0.0, 1.0).astype(jnp.float32)
        ramp = initial + (final - initial) * shape(t)
        # `end` need not lie on the staircase, and the last value must be exact
        return jnp.where(step >= end, final, ramp).astype(jnp.float32)

    return schedule
