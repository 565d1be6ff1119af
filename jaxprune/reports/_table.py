"""What compression gained, leaf by leaf and in total."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._progress import stages
from jaxprune._timing import in_turns
from jaxprune._types import Params, PyTree, is_compressed
from jaxprune.reports._lines import BY, Line, Row, lines_of
from jaxprune.reports._show import html_of, markdown_of, table_of, text_of
from jaxprune.reports._size import leaf_nbytes
from jaxprune.runtime import compressed as run_compressed

_RUNS = 20
_BUDGET_SECONDS = 2.0
_NOISE, _SHORTEST = 1.1, 1e-4  # of a call: less is not told


@dataclass(frozen=True)
class Report:
    """A report as data; `print(report)` or `report.table` shows it.

    Attributes:
      rows: one per leaf.
      seconds_dense: seconds per call before, best of several; `None` where not measured.
      seconds_now: seconds per call now, likewise.
      by: what a line shows, see `report`.
      max_rows: how many lines are shown; `None` for all.
    """

    rows: tuple[Row, ...]
    seconds_dense: float | None = None
    seconds_now: float | None = None
    by: str = "auto"
    max_rows: int | None = 40

    @property
    def bytes_dense(self) -> int:
        """Bytes of all leaves before."""
        return sum(row.bytes_dense for row in self.rows)

    @property
    def bytes_now(self) -> int:
        """Bytes of all leaves now."""
        return sum(row.bytes_now for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among all entries."""
        size = sum(row.size for row in self.rows)
        return sum(row.sparsity * row.size for row in self.rows) / size if size else 0.0

    @property
    def table(self) -> Any:
        """The report as a `rich` table."""
        return table_of(self.lines, self._caption)

    @property
    def lines(self) -> list[Line]:
        """The lines that are shown: leaves or parts of the network, the largest first, and the total."""
        return lines_of(self.rows, self.by, self.max_rows)

    @property
    def markdown(self) -> str:
        """The report as a Markdown table."""
        return markdown_of(self.lines, self._caption)

    @property
    def html(self) -> str:
        """The report as an HTML table, without styles."""
        return html_of(self.lines, self._caption)

    @property
    def _caption(self) -> str:
        parts = ["bytes are those in memory"]
        if any(row.sparsity > 0 and row.shape == row.shape_now for row in self.rows):
            parts[0] += (
                ", where a zero takes as many as any number; files of jp.export.save(entropy=True) and "
                "jp.sparsify_tree hold zeros in fewer"
            )
        if self.seconds_dense is not None and self.seconds_now is not None:
            parts.append(
                f"latency {human_seconds(self.seconds_dense)} dense, "
                f"{human_seconds(self.seconds_now)} now "
                f"({_speed(self.seconds_dense, self.seconds_now)})"
            )
        return "; ".join(parts)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield table_of(self.lines, self._caption, console, options)

    def __str__(self) -> str:
        return text_of(self.lines, self._caption)


def report(
    fn: Callable[..., Any] | None,
    params: Params,
    compressed: PyTree,
    *args: Any,
    compressed_fn: Callable[..., Any] | None = None,
    by: str = "auto",
    max_rows: int | None = 40,
) -> Report:
    """Compares parameters with their compressed form.

    Args:
      fn: `fn(params, *args)`, jittable, or `None`. With inputs it is timed on both trees in turns,
        jitted, on compressed leaves as `jp.compressed` runs it.
      params: the dense tree.
      compressed: a tree with the same paths: masked, quantized, or both; or smaller, from `jp.compact`.
      *args: inputs of `fn`. Without any, nothing is timed.
      compressed_fn: what takes `compressed` instead of `fn`, such as the small function of `jp.compact`.
      by: what a line shows: `"leaf"`; `"layer"`, the leaves of a module together; `"block"`, all up to
        the first number in a path, such as `encoder/layers_3`; `"auto"`: the finest that needs at most
        `max_rows` lines.
      max_rows: lines that are shown, the largest first; what is left is one more line. `None`: all.

    Returns:
      A `Report`; print it, take its `table`, `markdown` or `html`, or read its rows, one per leaf.

    Raises:
      ValueError: trees of different structure or leaves of larger shape; an unknown `by`.

    Warns:
      UserWarning: the compressed function was measured slower than the dense one, by more than a tenth.

    Example:
      >>> params = {"w": jnp.ones((64, 64)), "b": jnp.zeros(64)}
      >>> found = jp.report(None, params, jp.quantize_tree(params, bits=4))
      >>> found.bytes_dense, found.bytes_now
      (16640, 2560)
    """
    _checks.choice("by", by, BY)
    if max_rows is not None:
        _checks.positive_int("max_rows", max_rows)
    compressed = _checks.aligned("compressed", compressed, "params", params)
    paths, dense, treedef = _trees.flatten(params)
    held = treedef.flatten_up_to(compressed)
    now = treedef.flatten_up_to(_trees.resolve_ties(compressed))
    best: dict[str, float] = {}
    with stages("report") as stage:
        stage(f"counting zeros of {len(paths)} leaves")
        rows = _rows(paths, dense, now, held)
        if fn is not None and args:
            stage("compiling and timing both functions")
            before, after = jax.jit(fn), jax.jit(run_compressed(compressed_fn or fn))
            found = in_turns(
                {
                    "before": lambda: before(params, *args),
                    "after": lambda: after(compressed, *args),
                },
                rounds=_RUNS,
                budget=2 * _BUDGET_SECONDS,
            )
            best = {name: float(times.min()) for name, times in found.items()}
    if best:
        is_compacted = any(r.shape != r.shape_now for r in rows)
        _tell_slower(best["before"], best["after"], is_compacted=is_compacted)
    return Report(rows, best.get("before"), best.get("after"), by, max_rows)


def _tell_slower(before: float, after: float, *, is_compacted: bool) -> None:
    """Warns where smaller is slower, by more than noise."""
    if after <= _NOISE * before or after < _SHORTEST:
        return
    cure = (
        "remove units by jp.structure.unit_masks(latency=…), or to widths that the platform computes "
        'fast: round_to="auto" under flops= and params=, a number such as 32 under sparsity='
        if is_compacted
        else "see how products run: jp.compressed(fn).explain(params, *args)"
    )
    warnings.warn(
        f"report: smaller is slower: {human_seconds(after)} a call, {human_seconds(before)} dense "
        f"({after / before:.2f}x) on {jax.default_backend()}, best of calls in turns; {cure}",
        stacklevel=3,
    )


def _rows(paths: list[str], dense: list[Any], now: list[Any], held: list[Any]) -> tuple[Row, ...]:
    for path, before, leaf in zip(paths, dense, now, strict=True):
        shape, left = tuple(np.shape(before)), _shape(leaf)
        if len(left) != len(shape) or any(a > b for a, b in zip(left, shape, strict=True)):
            raise ValueError(
                f"compressed: leaf {path!r} has shape {left}, expected {shape} or a smaller one; compare "
                "a tree with its own compressed form"
            )
    counts = [_zeros(leaf) if np.size(x) else 0 for x, leaf in zip(dense, now, strict=True)]
    found = zip(paths, dense, now, held, jax.device_get(counts), strict=True)
    return tuple(_row(*item) for item in found)


def _zeros(leaf: Any) -> Any:
    """How many entries of a leaf are zero."""
    if is_compressed(leaf):
        return _zeros_of_compressed(leaf)
    return np.count_nonzero(np.asarray(leaf) == 0) if hasattr(leaf, "dtype") else 0


@jax.jit
def _zeros_of_compressed(leaf: Any) -> jax.Array:
    """Compiled once for all leaves of a kind and shape."""
    return jnp.sum(leaf.materialize() == 0)


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape if is_compressed(leaf) else np.shape(leaf))


def _row(path: str, before: Any, now: Any, held: Any, zeros: Any) -> Row:
    shape, left = tuple(np.shape(before)), _shape(now)
    size, bytes_now = int(np.prod(shape)), leaf_nbytes(held)
    return Row(
        path=path,
        shape=shape,
        dtype=str(getattr(before, "dtype", type(before).__name__)),
        sparsity=(size - int(np.prod(left)) + int(zeros)) / size if size else 0.0,
        bits=8 * bytes_now / size if size else 0.0,
        bytes_dense=leaf_nbytes(before),
        bytes_now=bytes_now,
        shape_now=left,
    )


def seconds(fn: Callable[..., Any], *args: Any) -> float:
    """Measure a jitted call of `fn`, compiled before: the best of several within two seconds.

    Args:
      fn: any traceable function.
      *args: its inputs.

    Returns:
      Seconds.

    Example:
      >>> 0 < jp.reports.seconds(jnp.tanh, jnp.ones(3)) < 2
      True
    """
    run = jax.jit(fn)
    jax.block_until_ready(run(*args))
    best, begin = float("inf"), time.perf_counter()
    for _ in range(_RUNS):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > _BUDGET_SECONDS:
            break
    return best


def human_seconds(value: float) -> str:
    """`1.5 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1.0:
            return f"{value * factor:.2f} {unit}"
    return f"{value * 1e6:.2f} µs"


def _speed(before: float, now: float) -> str:
    return f"{before / now:.2f}x faster" if now <= before else f"{now / before:.2f}x slower"
