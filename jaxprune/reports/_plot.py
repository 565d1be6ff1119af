"""Pictures; matplotlib is loaded only here, and only when a picture is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxprune import _checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_accuracy(
    path: str | Path,
    names: Sequence[str],
    nbytes: Sequence[float],
    accuracy: Sequence[float],
    *,
    title: str = "Accuracy against size",
) -> Path:
    """Draws accuracy over bytes, one labelled point per model, to a PNG, PDF or SVG file.

    Args:
      path: the file; its suffix chooses the format.
      names: label of each point.
      nbytes: bytes of each model, above 0; the axis is logarithmic.
      accuracy: fraction correct of each model, in [0, 1].
      title: title of the picture.

    Returns:
      The path.

    Raises:
      ValueError: lists of different length.
      ImportError: matplotlib is missing.

    Example:
      >>> from jaxprune.reports import plot_accuracy
      >>> import tempfile
      >>> file = tempfile.mkdtemp() + "/plot.png"
      >>> plot_accuracy(file, ["dense", "int8"], [4e6, 1e6], [0.98, 0.979]).name
      'plot.png'
    """
    if not len(names) == len(nbytes) == len(accuracy):
        raise ValueError(
            f"names, nbytes, accuracy: expected the same length, got {len(names)}, {len(nbytes)} "
            f"and {len(accuracy)}"
        )
    for value in nbytes:
        _checks.positive("nbytes", value)
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    size, percent = np.asarray(nbytes) / 1000, 100 * np.asarray(accuracy)
    for rank, i in enumerate(np.argsort(size, kind="stable")):
        # neighbours by size have their labels on different sides
        offset, side = ((0, 9), "bottom") if rank % 2 == 0 else ((0, -9), "top")
        axes.scatter(size[i], percent[i], s=60)
        axes.annotate(
            f"{names[i]}\n{percent[i]:.1f} %",
            (size[i], percent[i]),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va=side,
        )
    axes.set_xscale("log")
    axes.set_xticks(size, [f"{x:,.0f}" for x in size])
    axes.minorticks_off()
    axes.set_xlabel("size on disk in kB (logarithmic)")
    axes.set_ylabel("test accuracy in %")
    axes.set_title(title)
    axes.margins(x=0.15)
    low, high = percent.min(), percent.max()
    axes.set_ylim(low - max(1.0, high - low), high + max(1.0, high - low))
    axes.grid(alpha=0.3)
    path = Path(path)
    figure.savefig(path)
    return path


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is missing: pip install "jaxprune[plots]"') from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")
