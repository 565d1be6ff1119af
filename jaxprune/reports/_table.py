"""What compression gained, leaf by leaf and in total."""

import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console, JustifyMethod
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._timing import in_turns
from jaxprune._types import Params, PyTree, is_compressed
from jaxprune.reports._size import leaf_nbytes
from jaxprune.runtime import compressed as run_compressed

_LETTERS = {"bfloat": "bf", "float": "f", "uint": "u", "int": "i"}
_SHORT = re.compile("|".join(_LETTERS))
_RUNS = 20
_BUDGET_SECONDS = 2.0
_NOISE, _SHORTEST = 1.1, 1e-4  # of a call: less is not told


@dataclass(frozen=True)
class Row:
    """One leaf of a report.

    Attributes:
      path: '/'-joined path.
      shape: dense shape.
      dtype: dense dtype, by name.
      sparsity: fraction of entries that are zero or removed, in [0, 1].
      bits: bits held per entry of the dense shape, scales and the like included.
      bytes_dense: bytes before.
      bytes_now: bytes now.
      shape_now: shape now, smaller where units were removed.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    bits: float
    bytes_dense: int
    bytes_now: int
    shape_now: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """A report as data; `print(report)` or `report.table` shows it.

    Attributes:
      rows: one per leaf.
      seconds_dense: seconds per call before, best of several; `None` where not measured.
      seconds_now: seconds per call now, likewise.
    """

    rows: tuple[Row, ...]
    seconds_dense: float | None = None
    seconds_now: float | None = None

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
        size = sum(_size(row) for row in self.rows)
        return sum(row.sparsity * _size(row) for row in self.rows) / size if size else 0.0

    @property
    def table(self) -> Table:
        """The report as a `rich` table."""
        table = Table(title="Compression report", show_footer=True)
        size = sum(_size(row) for row in self.rows)
        columns: list[tuple[str, str, JustifyMethod]] = [
            ("leaf", "total", "left"),
            ("shape", f"{size:,}", "left"),
            ("dtype", "", "left"),
            ("zeros", f"{self.sparsity:.1%}", "right"),
            ("bits", f"{8 * self.bytes_now / size:.2f}" if size else "", "right"),
            ("dense", human_bytes(self.bytes_dense), "right"),
            ("now", human_bytes(self.bytes_now), "right"),
            ("ratio", _ratio(self.bytes_dense, self.bytes_now), "right"),
        ]
        for header, footer, justify in columns:
            # sizes and ratios never wrap; a path may
            table.add_column(
                header,
                footer=footer,
                justify=justify,
                overflow="fold",
                no_wrap=header not in ("leaf", "shape"),
            )
        for row in self.rows:
            table.add_row(
                row.path or "(the array)",
                _sizes(row),
                _SHORT.sub(lambda m: _LETTERS[m[0]], row.dtype),
                f"{row.sparsity:.1%}",
                f"{row.bits:.2f}",
                human_bytes(row.bytes_dense),
                human_bytes(row.bytes_now),
                _ratio(row.bytes_dense, row.bytes_now),
            )
        if self.seconds_dense is not None and self.seconds_now is not None:
            table.caption = (
                f"latency {human_seconds(self.seconds_dense)} dense, "
                f"{human_seconds(self.seconds_now)} now "
                f"({_speed(self.seconds_dense, self.seconds_now)})"
            )
        return table

    def __rich__(self) -> Table:
        return self.table

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table)
        return capture.get()


def report(
    fn: Callable[..., Any] | None,
    params: Params,
    compressed: PyTree,
    *args: Any,
    compressed_fn: Callable[..., Any] | None = None,
) -> Report:
    """Compares parameters with their compressed form.

    Args:
      fn: `fn(params, *args)`, jittable, or `None`. With inputs it is timed on both trees in turns,
        jitted, on compressed leaves as `jp.compressed` runs it.
      params: the dense tree.
      compressed: a tree with the same paths: masked, quantized, or both; or smaller, from `jp.compact`.
      *args: inputs of `fn`. Without any, nothing is timed.
      compressed_fn: what takes `compressed` instead of `fn`, such as the small function of `jp.compact`.

    Returns:
      A `Report`; print it, or read its rows.

    Raises:
      ValueError: trees of different structure or leaves of larger shape.

    Warns:
      UserWarning: the compressed function was measured slower than the dense one, by more than a tenth.

    Example:
      >>> params = {"w": jnp.ones((64, 64)), "b": jnp.zeros(64)}
      >>> found = jp.report(None, params, jp.quantize_tree(params, bits=4))
      >>> found.bytes_dense, found.bytes_now
      (16640, 2560)
    """
    compressed = _checks.aligned("compressed", compressed, "params", params)
    paths, dense, treedef = _trees.flatten(params)
    held = treedef.flatten_up_to(compressed)
    now = treedef.flatten_up_to(_trees.resolve_ties(compressed))
    rows = tuple(_row(*item) for item in zip(paths, dense, now, held, strict=True))
    if fn is None or not args:
        return Report(rows)
    before, after = jax.jit(fn), jax.jit(run_compressed(compressed_fn or fn))
    found = in_turns(
        {"before": lambda: before(params, *args), "after": lambda: after(compressed, *args)},
        rounds=_RUNS,
        budget=2 * _BUDGET_SECONDS,
    )
    best = {name: float(times.min()) for name, times in found.items()}
    _tell_slower(
        best["before"], best["after"], is_compacted=any(r.shape != r.shape_now for r in rows)
    )
    return Report(rows, best["before"], best["after"])


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


def _row(path: str, before: Any, now: Any, held: Any) -> Row:
    shape = tuple(np.shape(before))
    left = tuple(now.shape if is_compressed(now) else np.shape(now))
    if len(left) != len(shape) or any(a > b for a, b in zip(left, shape, strict=True)):
        raise ValueError(
            f"compressed: leaf {path!r} has shape {left}, expected {shape} or a smaller one; compare a "
            "tree with its own compressed form"
        )
    size = int(np.prod(shape))
    bytes_now = leaf_nbytes(held)
    values = _trees.dense(now)
    removed = size - int(np.prod(left))
    zeros = removed + (int(jnp.sum(values == 0)) if size and hasattr(values, "dtype") else 0)
    return Row(
        path=path,
        shape=shape,
        dtype=str(getattr(before, "dtype", type(before).__name__)),
        sparsity=zeros / size if size else 0.0,
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


def human_bytes(count: float) -> str:
    """`1.5 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def human_seconds(value: float) -> str:
    """`1.5 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1.0:
            return f"{value * factor:.2f} {unit}"
    return f"{value * 1e6:.2f} µs"


def _speed(before: float, now: float) -> str:
    return f"{before / now:.2f}x faster" if now <= before else f"{now / before:.2f}x slower"


def _ratio(before: int, now: int) -> str:
    return f"{before / now:.2f}x" if now else "-"


def _size(row: Row) -> int:
    return int(np.prod(row.shape))


def _sizes(row: Row) -> str:
    """`3×3×32`, and after an arrow the axes that shrank."""
    pairs = zip(row.shape, row.shape_now, strict=True)
    return "×".join(str(a) if a == b else f"{a}→{b}" for a, b in pairs) or "scalar"
