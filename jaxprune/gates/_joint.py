"""Training a network and its gates together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Loss = Callable[..., tuple[Float[Array, ""], dict[str, Any]]]


def joint_loss(
    fn: Callable[..., tuple[Any, Any]],
    task: Callable[[Any, Any], Array],
    cost: Callable[[Any], Array],
    *,
    weight: Any,
    temperature: Any = None,
    inputs: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[Float[Array, ""], dict[str, Any]]]:
    """A loss for joint training: `task + weight * cost`.

    Args:
      fn: `fn(params, *inputs, key=key) -> (outputs, gates)`: a `GatedFunction` with parameters of the
        network and of its gates in one tree, or a Flax module that hands out its gates.
      task: `(outputs, batch) -> scalar`.
      cost: `gates -> scalar`, such as `lambda gates: jp.gates.weighted_cost(gates, costs)`.
      weight: of the cost: a number, or `step -> number`, such as `jp.schedules.linear(0.3, end=1000)` for
        a warm-up.
      temperature: `step -> number`; if given, handed to `fn` as `temperature=`, to anneal gates that
        draw.
      inputs: what of a batch is given to `fn`; by default the first entry of a tuple.

    Returns:
      `loss_fn(params, batch, step, key=None) -> (loss, aux)`; `aux` holds `"task"`, `"cost"`, `"weight"`,
      `"gates"` and `"outputs"`. Differentiate with `jax.value_and_grad(loss_fn, has_aux=True)`.

    Example:
      >>> fn = lambda p, x, key: ((x * p["gate"]).sum(-1), {"layer": jax.nn.sigmoid(p["gate"])[None]})
      >>> task = lambda out, batch: jnp.mean((out - batch[1]) ** 2)
      >>> loss_fn = jp.gates.joint_loss(fn, task, lambda gates: jp.gates.l1_penalty(gates["layer"]),
      ...                          weight=jp.schedules.linear(1.0, end=10))
      >>> loss, aux = loss_fn({"gate": jnp.zeros(2)}, (jnp.ones((3, 2)), jnp.zeros(3)), 5)
      >>> float(loss), float(aux["weight"]), float(aux["cost"])
      (0.25, 0.5, 0.5)

    Reference: Bejnordi et al., "Batch-shaping for learning conditional channel gated networks", 2019,
    https://arxiv.org/abs/1907.06627
    """
    first = lambda batch: batch[0] if isinstance(batch, tuple | list) else batch
    inputs = first if inputs is None else inputs

    def loss_fn(
        params: Any, batch: Any, step: Any, key: jax.Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        given = inputs(batch)
        more = {} if temperature is None else {"temperature": temperature(step)}
        outputs, gates = fn(
            params, *(given if isinstance(given, tuple) else (given,)), key=key, **more
        )
        each = {
            "task": task(outputs, batch),
            "cost": cost(gates),
            "weight": jnp.asarray(weight(step) if callable(weight) else weight, jnp.float32),
        }
        return each["task"] + each["weight"] * each["cost"], {
            **each,
            "gates": gates,
            "outputs": outputs,
        }

    return loss_fn
