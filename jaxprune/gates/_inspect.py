"""What gates do on a set of examples: rates, units that never change, and what each example costs."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from rich.table import Table

from jaxprune.gates._costs import example_costs


@dataclass(frozen=True)
class Inspection:
    """What `jp.gates.inspect` saw.

    Attributes:
      rates: per layer and gate, the share of examples that open it, (gates,).
      by_class: the same for the examples of each class, (classes, gates); empty without labels.
      costs: of each example, as a fraction of everything open, (examples,).
      difficulty: of each example, such as its loss, or None.
      labels: of each example, or None.
    """

    rates: dict[str, np.ndarray]
    by_class: dict[str, np.ndarray]
    costs: np.ndarray
    difficulty: np.ndarray | None = None
    labels: np.ndarray | None = None
    examples: int = field(default=0, kw_only=True)

    def always_on(self, tolerance: float = 0.0) -> dict[str, np.ndarray]:
        """Per layer, the gates that all examples open, or all but a share of `tolerance`."""
        return {name: rate >= 1 - tolerance for name, rate in self.rates.items()}

    def always_off(self, tolerance: float = 0.0) -> dict[str, np.ndarray]:
        """Per layer, the gates that no example opens, or only a share of `tolerance`.

        With the names of groups, as `jp.gates.attach` has them, `jp.structure.keep_units` turns the
        opposite into masks, and `jp.structure.unit_masks` takes `rates` as scores of units: what is
        dynamic and never used becomes static, and can be removed.
        """
        return {name: rate <= tolerance for name, rate in self.rates.items()}

    @property
    def by_cost(self) -> np.ndarray:
        """Numbers of the examples, the cheapest first."""
        return np.argsort(self.costs, kind="stable")

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation of cost and difficulty: above 0 if harder examples cost more."""
        if self.difficulty is None or len(self.costs) < 2:
            return None
        cost, difficulty = (_ranks(x) for x in (self.costs, self.difficulty))
        spread = cost.std() * difficulty.std()
        if spread == 0:
            return 0.0
        centred = (cost - cost.mean()) * (difficulty - difficulty.mean())
        return float(centred.mean() / spread)

    @property
    def table(self) -> Table:
        """Rates and units that never change, by layer."""
        title = f"Gates on {self.examples:,} examples, mean cost {self.costs.mean():.1%}"
        table = Table(title=title)
        table.add_column("layer")
        for column in ("gates", "open", "always on", "always off", "by class, least to most"):
            table.add_column(column, justify="right")
        for name, rate in self.rates.items():
            classes = "-"
            if name in self.by_class:
                means = np.nanmean(self.by_class[name], 1)
                classes = f"{np.nanmin(means):.1%} to {np.nanmax(means):.1%}"
            table.add_row(
                name,
                str(rate.size),
                f"{rate.mean():.1%}",
                str(int((rate >= 1).sum())),
                str(int((rate <= 0).sum())),
                classes,
            )
        return table

    def __rich__(self) -> Table:
        return self.table


def inspect(
    gates: Mapping[str, Any],
    *,
    labels: Any = None,
    costs: Any = None,
    inputs: Mapping[str, str] | None = None,
    difficulty: Any = None,
) -> Inspection:
    """Looks at gates of many examples, see `over_batches`.

    Args:
      gates: by layer, (examples, gates…); open where not 0.
      labels: integers (examples,), for rates by class.
      costs: of each layer, and `inputs`, as for `example_costs`; or a cost of each example, (examples,),
        such as `gated.spent(gates)`. By default all gates cost the same.
      inputs: see `example_costs`.
      difficulty: of each example, such as its loss, (examples,).

    Returns:
      An `Inspection`: print its `table`, draw it with `jp.reports.plot_gates`.

    Raises:
      ValueError: no gates, no examples, lengths that differ.

    Example:
      >>> gates = {"conv": jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])}
      >>> seen = jp.gates.inspect(gates, labels=jnp.array([0, 1]), difficulty=jnp.array([0.1, 2.0]))
      >>> seen.rates["conv"].tolist(), seen.always_off()["conv"].tolist()
      ([1.0, 0.5, 0.0], [False, False, True])
      >>> seen.by_cost.tolist(), round(seen.correlation, 3)
      ([0, 1], 1.0)
    """
    opened = {name: _rows(np.asarray(value)) != 0 for name, value in gates.items()}
    if not opened:
        raise ValueError("gates: expected at least one layer")
    count = len(next(iter(opened.values())))
    if count == 0:
        raise ValueError("gates: expected at least one example")
    given = {"labels": labels, "difficulty": difficulty}
    for name, value in [*opened.items(), *((k, v) for k, v in given.items() if v is not None)]:
        if len(value) != count or (name in given and np.ndim(value) != 1):
            raise ValueError(
                f"{name}: shape {np.shape(value)}, expected {count} examples along the first axis"
            )
    if costs is None:
        costs = {name: float(value.shape[1]) for name, value in opened.items()}
    if isinstance(costs, Mapping):
        floats = {name: value.astype(np.float32) for name, value in opened.items()}
        costs = example_costs(floats, costs, inputs=inputs)
    costs = np.asarray(costs, np.float64)
    if costs.shape != (count,):
        raise ValueError(f"costs: shape {costs.shape}, expected one for each of {count} examples")
    by_class = {}
    if labels is not None:
        labels = np.asarray(labels)
        by_class = {name: _by_class(value, labels) for name, value in opened.items()}
    return Inspection(
        {name: value.mean(0) for name, value in opened.items()},
        by_class,
        costs,
        None if difficulty is None else np.asarray(difficulty, np.float64),
        labels,
        examples=count,
    )


def over_batches(fn: Callable[..., Any], batches: Iterable[Any]) -> Any:
    """What a function makes of batches, gathered on the host along the first axis.

    Args:
      fn: `fn(*batch) -> tree of arrays`, each with the examples of the batch along its first axis; it is
        jitted.
      batches: tuples of arrays, or lone arrays.

    Returns:
      The tree, with NumPy arrays for all examples.

    Raises:
      ValueError: no batches.

    Example:
      >>> images = [jnp.ones((2, 3)), jnp.zeros((1, 3))]
      >>> jp.gates.over_batches(lambda x: {"sum": x.sum(-1)}, images)["sum"].tolist()
      [3.0, 3.0, 0.0]
    """
    run = jax.jit(fn)
    parts = [
        jax.device_get(run(*(batch if isinstance(batch, tuple) else (batch,)))) for batch in batches
    ]
    if not parts:
        raise ValueError("batches: none were given")
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), math.prod(x.shape[1:])) if x.ndim else x.reshape(0, 0)


def _by_class(opened: np.ndarray, labels: np.ndarray) -> np.ndarray:
    found = np.full((int(labels.max()) + 1, opened.shape[1]), np.nan)
    for label in np.unique(labels):
        found[label] = opened[labels == label].mean(0)
    return found


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, the mean of them for ties."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
