"""Early exit: easy examples leave at the first heads, hard ones go on."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune import _checks

Stage = Callable[[Array], Array]


def confidence(logits: Float[Array, "batch classes"]) -> Float[Array, "batch"]:
    """The largest probability.

    Args:
      logits: (batch, classes).

    Returns:
      (batch,), in (0, 1].

    Example:
      >>> jp.gates.confidence(jnp.zeros((1, 4))).tolist()
      [0.25]
    """
    return jnp.max(jax.nn.softmax(logits, -1), -1)


def early_exit(
    stages: Sequence[Stage],
    heads: Sequence[Stage],
    x: Float[Array, "batch ..."],
    *,
    capacities: Sequence[int],
    confidence: Callable[[Array], Array] = confidence,
) -> tuple[Float[Array, "batch classes"], Int[Array, "batch"]]:
    """Sorted early exit: after each stage, the examples that are surest leave, and only the others go on.

    Args:
      stages: `features -> features`, each on what the one before made.
      heads: `features -> logits`, one per stage.
      x: a batch.
      capacities: how many examples each stage after the first takes: of fixed sizes, so that all is
        compiled.
      confidence: `logits -> (batch,)`; by default the largest probability.

    Returns:
      Logits of each example from the head where it left, and the number of that stage.

    Raises:
      ValueError: numbers of stages, heads and capacities that do not fit.

    Example:
      >>> stage, head = (lambda x: x + 1), (lambda x: jnp.concatenate([x, -x], -1))
      >>> logits, left = jp.gates.early_exit([stage] * 2, [head] * 2, jnp.array([[9.0], [-1.0]]),
      ...                                    capacities=[1])
      >>> left.tolist(), logits[:, 0].tolist()
      ([0, 1], [10.0, 1.0])

    Reference: Teerapittayanon et al., BranchyNet, 2017, https://arxiv.org/abs/1709.01686
    """
    _check_stages(stages, heads)
    if len(capacities) != len(stages) - 1:
        raise ValueError(
            f"capacities: {len(capacities)} for {len(stages)} stages; expected one for all but the first"
        )
    features = stages[0](x)
    logits = heads[0](features)
    left = jnp.zeros(x.shape[0], jnp.int32)
    rows = jnp.arange(x.shape[0])
    now = logits
    for number, capacity in enumerate(capacities, 1):
        _checks.positive_int("capacities", capacity)
        if capacity > len(rows):
            raise ValueError(f"capacities: {capacity} is more than the {len(rows)} examples before")
        index = jax.lax.top_k(-confidence(now), capacity)[1]
        rows, features = rows[index], stages[number](features[index])
        now = heads[number](features)
        logits, left = logits.at[rows].set(now), left.at[rows].set(number)
    return logits, left


def exit_when_confident(
    stages: Sequence[Stage],
    heads: Sequence[Stage],
    x: Float[Array, "batch ..."],
    *,
    threshold: Any,
    confidence: Callable[[Array], Array] = confidence,
) -> tuple[Float[Array, "batch classes"], Int[Array, ""]]:
    """Leaves at the first head that is sure enough; later stages do not run.

    One decision for all of `x`: meant for a batch of 1. In a larger batch the least sure example decides;
    under `vmap` all stages run. `early_exit` is for batches.

    Args:
      stages: `features -> features`, each on what the one before made.
      heads: `features -> logits`, one per stage, of one shape.
      x: input of the first stage.
      threshold: how sure it must be to leave; may be traced.
      confidence: `logits -> (batch,)`; by default the largest probability.

    Returns:
      Logits, and the number of the stage where they were made.

    Raises:
      ValueError: numbers of stages and heads that differ.

    Example:
      >>> stage, head = (lambda x: x + 1), (lambda x: jnp.concatenate([x, -x], -1))
      >>> logits, left = jp.gates.exit_when_confident([stage] * 3, [head] * 3, jnp.array([[0.0]]),
      ...                                        threshold=0.95)
      >>> int(left), logits[0, 0].item()
      (1, 2.0)

    Reference: Teerapittayanon et al., BranchyNet, 2017, https://arxiv.org/abs/1709.01686
    """
    _check_stages(stages, heads)

    def onward(number: int, features: Array) -> tuple[Array, Array]:
        features = stages[number](features)
        logits, here = heads[number](features), jnp.asarray(number, jnp.int32)
        if number == len(stages) - 1:
            return logits, here
        return jax.lax.cond(
            jnp.min(confidence(logits)) >= threshold,
            lambda features: (logits, here),
            lambda features: onward(number + 1, features),
            features,
        )

    return onward(0, x)


def exit_loss(
    logits: Sequence[Float[Array, "batch classes"]],
    loss: Callable[[Array], Array],
    *,
    weights: Sequence[float] | None = None,
) -> Float[Array, ""]:
    """The weighted mean of a loss over the logits of all exits: all heads train together.

    Args:
      logits: of each head.
      loss: `logits -> scalar`.
      weights: of the heads; all alike by default.

    Returns:
      A scalar.

    Raises:
      ValueError: numbers of logits and weights that differ, no positive sum of weights.

    Example:
      >>> logits = [jnp.zeros((2, 3)), jnp.ones((2, 3))]
      >>> float(jp.gates.exit_loss(logits, jnp.mean, weights=[1.0, 3.0]))
      0.75
    """
    weights = [1.0] * len(logits) if weights is None else list(weights)
    if len(weights) != len(logits) or sum(weights) <= 0:
        raise ValueError(
            f"weights: expected {len(logits)} with a positive sum, one per head, got {weights}"
        )
    total = [w * loss(y) for w, y in zip(weights, logits, strict=True)]
    return sum(total[1:], start=total[0]) / sum(weights)


def _check_stages(stages: Sequence[Stage], heads: Sequence[Stage]) -> None:
    if len(stages) != len(heads) or not stages:
        raise ValueError(
            f"stages: {len(stages)} stages and {len(heads)} heads; expected one head per stage"
        )


def check_heads(stages: Sequence[Any], classes: int | None, heads: Sequence[Any] | None) -> None:
    """Checks what a module with exits is made of."""
    if (classes is None) == (heads is None):
        raise ValueError("classes, heads: expected one of them")
    if heads is None:
        _checks.positive_int("classes", classes)
    _check_stages(stages, stages if heads is None else heads)


def all_exits(stages: Sequence[Stage], heads: Sequence[Stage], x: Array) -> list[Array]:
    """Logits of all heads, for training."""
    found = []
    for stage, head in zip(stages, heads, strict=True):
        x = stage(x)
        found.append(head(x))
    return found


def left_early(
    stages: Sequence[Stage], heads: Sequence[Stage], x: Array, *, capacities: Any, threshold: Any
) -> tuple[Array, Array]:
    """Either kind of early exit."""
    if (capacities is None) == (threshold is None):
        raise ValueError("capacities, threshold: expected one of them")
    if capacities is not None:
        return early_exit(stages, heads, x, capacities=capacities)
    if x.shape[0] != 1:
        raise ValueError(
            f"threshold: one decision for a batch of 1, got {x.shape[0]} examples; give capacities"
        )
    return exit_when_confident(stages, heads, x, threshold=threshold)
