"""A picture of sparse training: what was lost, what stayed, what moved."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxprune.reports._plot import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAF = "masks/sparsity/"
# title of a panel, what it shows, in this order
_PANELS = (
    ("fraction of the weights", ("masks/sparsity", "masks/overlap", "masks/churn")),
    ("connections in the last move", ("masks/dropped", "masks/regrown")),
    ("dead units", ("masks/dead_units",)),
)
_SHOWN = 12  # leaves


def plot_training(
    path: str | Path,
    history: Sequence[Mapping[str, Any]],
    *,
    steps: Sequence[int] | None = None,
    title: str = "Sparse training",
) -> Path:
    """Draws what `jp.optim.metrics` gave over the training, and whatever else was kept beside it.

    One panel each for the metrics without `masks/` (a loss, an accuracy); sparsity, overlap with earlier
    masks and churn; connections dropped and regrown; dead units; and the sparsity of each leaf.
    Panels of which nothing is there are left out.

    Args:
      path: the file; its suffix chooses the format.
      history: one dictionary of scalars per point in time, such as
        `jp.optim.metrics(opt_state, per_leaf=True) | {"loss": loss}`. A name may be missing at some.
      steps: the step of each point; their numbers by default.
      title: title of the picture.

    Returns:
      The path.

    Raises:
      ValueError: an empty history, another number of steps, or a value that is no scalar.
      ImportError: matplotlib is missing.

    Example:
      >>> import tempfile
      >>> tx, params = jp.optim.rigl(optax.sgd(0.1), 0.5, key=jax.random.key(0)), {"w": jnp.ones((4, 4))}
      >>> state, history = tx.init(params), []
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     history.append(jp.optim.metrics(state) | {"loss": 1.0})
      >>> jp.reports.plot_training(tempfile.mkdtemp() + "/training.svg", history).name
      'training.svg'
    """
    if not history:
        raise ValueError("history: expected at least one dictionary of metrics, got none")
    if steps is not None and len(steps) != len(history):
        raise ValueError(f"steps: {len(steps)}, expected one for each of {len(history)} points")
    at = np.arange(len(history)) if steps is None else np.asarray(steps)
    names = list(dict.fromkeys(name for point in history for name in point))
    lines = {name: np.array([_scalar(name, point) for point in history]) for name in names}
    panels = _panels(names)
    figure = new_figure(4.4 * min(len(panels), 3), 3.4 * (1 + (len(panels) - 1) // 3))
    figure.suptitle(title)
    columns = min(len(panels), 3)
    grid = figure.add_gridspec(1 + (len(panels) - 1) // 3, columns)
    for i, (label, shown) in enumerate(panels):
        _draw(figure.add_subplot(grid[i // columns, i % columns]), label, at, lines, shown)
    path = Path(path)
    figure.savefig(path)
    return path


def _scalar(name: str, point: Mapping[str, Any]) -> float:
    value = np.asarray(point.get(name, np.nan))
    if value.ndim:
        raise ValueError(f"history: {name!r} has shape {value.shape}, expected a scalar")
    return float(value)


def _panels(names: list[str]) -> list[tuple[str, list[str]]]:
    own = [(name, [name]) for name in names if not name.startswith("masks/")]
    fixed = [(label, [n for n in shown if n in names]) for label, shown in _PANELS]
    leaves = ("sparsity of leaves", [n for n in names if n.startswith(_LEAF)][:_SHOWN])
    found = [*own, *fixed, leaves]
    return [(label, shown) for label, shown in found if shown]


def _draw(
    axes: "Axes", label: str, at: np.ndarray, lines: Mapping[str, np.ndarray], shown: list[str]
) -> None:
    for name, style in zip(shown, cycle(("-", "--")), strict=False):  # equal ones stay visible
        values, short = lines[name], name.removeprefix(_LEAF).removeprefix("masks/")
        known = np.isfinite(values)
        axes.plot(at[known], values[known], label=short, linestyle=style)
    if len(shown) > 1:
        axes.legend(fontsize=7)
    if label == "fraction of the weights" or shown[0].startswith(_LEAF):
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(label, fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
