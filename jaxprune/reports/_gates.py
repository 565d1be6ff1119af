"""A picture of what gates do on a set of examples."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxprune.reports._plot import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jaxprune.gates import Inspection

_BINS = 12
_SHOWN = 12  # images per row


def plot_gates(
    path: str | Path,
    seen: "Inspection",
    *,
    images: Any = None,
    classes: Any = None,
    title: str = "What the gates do",
) -> Path:
    """Draws rates of gates, rates by class, cost against difficulty, and images by cost.

    Args:
      path: the file; its suffix chooses the format.
      seen: from `jp.gates.inspect`. Rates by class need labels, cost against difficulty needs
        `difficulty`; panels without data are left out.
      images: of the examples, (examples, height, width, channels) or (examples, height, width), in
        [0, 1].
      classes: names of the classes.
      title: title of the picture.

    Returns:
      The path.

    Raises:
      ValueError: another number of images than examples.
      ImportError: matplotlib is missing.

    Example:
      >>> import tempfile
      >>> gates = {"conv": jax.random.bernoulli(jax.random.key(0), 0.5, (20, 6))}
      >>> seen = jp.gates.inspect(gates, labels=jnp.arange(20) % 3, difficulty=jnp.arange(20.0))
      >>> jp.reports.plot_gates(tempfile.mkdtemp() + "/gates.svg", seen).name
      'gates.svg'
    """
    if images is not None and len(images) != seen.examples:
        raise ValueError(
            f"images: {len(images)}, expected one for each of {seen.examples} examples"
        )
    panels = [_rates]
    if seen.by_class:
        panels.append(_classes)
    if seen.difficulty is not None:
        panels.append(_difficulty)
    rows = 1 if images is None else 2
    figure = new_figure(4.6 * len(panels), 3.8 + (2.6 if rows == 2 else 0))
    figure.suptitle(title)
    grid = figure.add_gridspec(rows, len(panels), height_ratios=[3.4, 2.2][:rows])
    for i, panel in enumerate(panels):
        panel(figure.add_subplot(grid[0, i]), seen, classes)
    if images is not None:
        _images(figure.add_subplot(grid[1, :]), seen, np.asarray(images))
    path = Path(path)
    figure.savefig(path)
    return path


def _rates(axes: "Axes", seen: "Inspection", classes: Any) -> None:
    """Each layer's gates, sorted by rate: flat ends never change, slopes decide per input."""
    for name, rate in seen.rates.items():
        place = (np.arange(rate.size) + 0.5) / rate.size
        axes.plot(place, np.sort(rate)[::-1], lw=1.8, label=f"{_short(name)} ({rate.size})")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("gates, sorted (share of the layer)")
    axes.set_ylabel("share of examples that open it")
    axes.set_title("rates", fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _classes(axes: "Axes", seen: "Inspection", classes: Any) -> None:
    """How each class differs from the mean, gate by gate."""
    names = list(seen.by_class)
    table = np.concatenate([seen.by_class[n] - seen.rates[n] for n in names], 1)
    order = np.concatenate(
        [
            np.argsort(-np.nan_to_num(seen.by_class[n]).std(0)) + start
            for n, start in zip(names, _starts(seen), strict=True)
        ]
    )
    image = axes.imshow(
        table[:, order], aspect="auto", cmap="coolwarm", vmin=-1, vmax=1, interpolation="nearest"
    )
    for start in _starts(seen)[1:]:
        axes.axvline(start - 0.5, color="black", lw=0.8)
    middles = [s + seen.rates[n].size / 2 - 0.5 for n, s in zip(names, _starts(seen), strict=True)]
    axes.set_xticks(middles, [_short(n) for n in names], fontsize=7, rotation=20)
    labels = list(range(len(table))) if classes is None else list(classes)
    axes.set_yticks(range(len(table)), [str(x) for x in labels], fontsize=7)
    axes.set_title("rate by class, minus the mean", fontsize=10)
    axes.figure.colorbar(image, ax=axes, fraction=0.05)


def _starts(seen: "Inspection") -> list[int]:
    sizes = [seen.rates[name].size for name in seen.by_class]
    return [0, *np.cumsum(sizes)[:-1].tolist()]


def _difficulty(axes: "Axes", seen: "Inspection", classes: Any) -> None:
    """Examples by difficulty, in bins of equal size: mean cost and its quartiles."""
    assert seen.difficulty is not None
    bins = [
        part
        for part in np.array_split(np.argsort(seen.difficulty, kind="stable"), _BINS)
        if len(part)
    ]
    place = [float(np.median(seen.difficulty[part])) for part in bins]
    low, middle, high = np.array([np.percentile(seen.costs[part], (25, 50, 75)) for part in bins]).T
    rank = np.arange(len(place))
    axes.fill_between(rank, 100 * low, 100 * high, alpha=0.25, label="middle half")
    axes.plot(
        rank, 100 * middle, "o-", ms=4, label=f"median (rank correlation {seen.correlation:+.2f})"
    )
    shown = rank[:: max(len(rank) // 5, 1)]
    axes.set_xticks(shown, [f"{place[i]:.2g}" for i in shown])
    axes.set_xlabel("difficulty (bins of equal size; label: median)")
    axes.set_ylabel("cost in % of all gates open")
    axes.set_title("cost against difficulty", fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _images(axes: "Axes", seen: "Inspection", images: np.ndarray) -> None:
    """The cheapest, middle and costliest images in three rows."""
    order = seen.by_cost
    count = min(_SHOWN, len(order))
    middle = (len(order) - count) // 2
    picked = [order[:count], order[middle : middle + count], order[len(order) - count :]]
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    rows = [np.concatenate([images[i] for i in row], axis=1) for row in picked]
    height = images.shape[1]
    axes.imshow(np.concatenate(rows), cmap="gray" if images.ndim == 3 else None, aspect="equal")
    names = [
        f"{name}\n{seen.costs[row].mean():.0%}"
        for name, row in zip(("cheapest", "middle", "costliest"), picked, strict=True)
    ]
    axes.set_yticks([height * (i + 0.5) for i in range(3)], names, fontsize=8)
    axes.set_xticks([])
    axes.set_title("images by cost", fontsize=10)


def _short(name: str) -> str:
    parts = name.split("/")
    return "/".join(parts[-2:]) if len(parts) > 2 else name
