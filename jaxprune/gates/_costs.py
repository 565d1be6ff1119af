"""What open gates cost: terms that push gates shut, or to a wanted rate.

Gates are numbers in [0, 1] of shape (batch, gates…), or chances of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks


def l1_penalty(gates: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean magnitude of gates (or of saliencies).

    Args:
      gates: any shape.

    Returns:
      A scalar.

    Example:
      >>> float(jp.gates.l1_penalty(jnp.array([1.0, 0.0, 0.0, 1.0])))
      0.5
    """
    return jnp.mean(jnp.abs(gates))


def target_rate(
    gates: Float[Array, "batch ..."], rate: Any, *, per: str = "batch"
) -> Float[Array, ""]:
    """The squared distance of the rate of open gates from a target.

    Args:
      gates: (batch, …).
      rate: wanted, in [0, 1]; may be traced.
      per: over all (`"batch"`), or each gate over the batch (`"gate"`), or each example (`"example"`),
        and the mean of those.

    Returns:
      A scalar.

    Raises:
      ValueError: a rate out of range, an unknown `per`.

    Example:
      >>> float(jp.gates.target_rate(jnp.array([[1.0, 0.0], [1.0, 0.0]]), 0.5))
      0.0

    Reference: Veit & Belongie, "Convolutional Networks with Adaptive Inference Graphs", 2018,
    https://arxiv.org/abs/1711.11503
    """
    _checks.fraction("rate", rate)
    _checks.choice("per", per, ("batch", "gate", "example"))
    axes = {"batch": None, "gate": 0, "example": tuple(range(1, jnp.ndim(gates)))}[per]
    return jnp.mean(jnp.square(jnp.mean(gates, axes) - rate))


def weighted_cost(
    gates: Mapping[str, Float[Array, "..."]],
    costs: Mapping[str, float],
    *,
    inputs: Mapping[str, str] | None = None,
) -> Float[Array, ""]:
    """The mean of `example_costs`: a term to add to a loss.

    Args:
      gates: of each gated layer, (batch, gates…): numbers in [0, 1], or chances.
      costs, inputs: see `example_costs`.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: layers without a cost.

    Example:
      >>> gates = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[1.0]])}
      >>> float(jp.gates.weighted_cost(gates, {"a": 2.0, "b": 1.0}))
      0.6666666865348816
    """
    return jnp.mean(example_costs(gates, costs, inputs=inputs))


def example_costs(
    gates: Mapping[str, Float[Array, "batch ..."]],
    costs: Mapping[str, float],
    *,
    inputs: Mapping[str, str] | None = None,
) -> Float[Array, "batch"]:
    """The cost of what gates open for each example, as a fraction of everything: FLOPs, or any other.

    A layer costs its share of open outputs, and, where another gated layer feeds it, of open inputs.

    Args:
      gates: of each gated layer, (batch, gates…): numbers in [0, 1], or chances. For what saliencies
        open, give `saliency != 0`.
      costs: of each layer with all gates open, such as `graph.cost()` tells. Names without gates are
        layers that always run; with `inputs` they may still read gated ones.
      inputs: by layer, the gated layer whose outputs it reads.

    Returns:
      (batch,), each in [0, 1].

    Raises:
      ValueError: layers without a cost, inputs that are not gated.

    Example:
      >>> gates = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[1.0, 0.0]])}
      >>> jp.gates.example_costs(gates, {"a": 2.0, "b": 2.0}, inputs={"b": "a"}).tolist()
      [0.375]
    """
    missing = sorted(set(gates) - set(costs))
    if missing:
        raise ValueError(f"costs: none for {missing[0]!r}; known are {sorted(costs)[:5]}")
    reads = dict(inputs or {})
    for layer, source in reads.items():
        if source not in gates or layer not in costs:
            raise ValueError(
                f"inputs: {layer!r} reads {source!r}; expected a name of costs, and one of gates: "
                f"{sorted(gates)[:5]}"
            )
    total = sum(costs.values())
    if total <= 0:
        raise ValueError(f"costs: expected a positive sum, got {total}")
    rate = {n: jnp.mean(g, tuple(range(1, jnp.ndim(g)))) for n, g in gates.items()}
    spent = [
        cost * rate.get(name, 1.0) * (rate[reads[name]] if name in reads else 1.0)
        for name, cost in costs.items()
    ]
    return jnp.asarray(sum(spent[1:], start=spent[0])) / total


def load_balance(
    chances: Float[Array, "batch experts"], chosen: Float[Array, "batch experts"]
) -> Float[Array, ""]:
    """Keeps one gate from taking everything: `experts sum_e mean(chances_e) mean(chosen_e)`, least 1.

    Args:
      chances: of each gate (softmax of logits).
      chosen: 1 where a gate was taken, one or a few per example.

    Returns:
      A scalar: 1 where all are used alike.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> even = jnp.full((2, 2), 0.5)
      >>> float(jp.gates.load_balance(even, jnp.eye(2)))
      1.0

    Reference: Fedus et al., "Switch Transformers", 2021, https://arxiv.org/abs/2101.03961
    """
    if jnp.shape(chances) != jnp.shape(chosen):
        raise ValueError(
            f"chosen: shape {jnp.shape(chosen)}, the chances have {jnp.shape(chances)}; give one per gate"
        )
    taken = jax.lax.stop_gradient(chosen)
    share = jnp.mean(taken, 0) / jnp.maximum(jnp.mean(jnp.sum(taken, -1)), 1e-9)
    return chances.shape[-1] * jnp.sum(jnp.mean(chances, 0) * share)


def entropy(logits: Float[Array, "..."]) -> Float[Array, ""]:
    """The mean entropy, in nats, of Bernoulli gates: subtract it to keep gates undecided.

    Args:
      logits: of gates.

    Returns:
      A scalar in [0, log 2].

    Example:
      >>> round(float(jp.gates.entropy(jnp.zeros(3))), 4)
      0.6931
    """
    p = jax.nn.sigmoid(logits)
    return jnp.mean(jax.nn.softplus(logits) - p * logits)
