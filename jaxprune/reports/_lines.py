"""What a report shows: leaves, or the leaves of a module or block together, the largest first."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_LETTERS = {"bfloat": "bf", "float": "f", "uint": "u", "int": "i"}
_SHORT = re.compile("|".join(_LETTERS))
BY = ("auto", "leaf", "layer", "block")
_TOTAL = "total"


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

    @property
    def size(self) -> int:
        """Entries of the dense shape."""
        return math.prod(self.shape)


class Line(NamedTuple):
    """One line, as text.

    Attributes:
      name: path of a leaf, or of what leaves have in common.
      shape: of a leaf; of several how many entries, and in how many leaves.
      dtype, zeros, bits, dense, now, ratio: see `Row`.
    """

    name: str
    shape: str
    dtype: str
    zeros: str
    bits: str
    dense: str
    now: str
    ratio: str


HEADER = Line("leaf", "shape", "dtype", "zeros", "bits", "dense", "now", "ratio")


def lines_of(rows: Sequence[Row], by: str, max_rows: int | None) -> list[Line]:
    """The lines of a report, and the total as the last."""
    parts = _parts(rows, by, max_rows)
    parts = sorted(parts.items(), key=lambda item: -sum(row.bytes_dense for row in item[1]))
    shown = parts if max_rows is None else parts[:max_rows]
    found = [_line(name, part) for name, part in shown]
    if rest := parts[len(shown) :]:
        left = [row for _, part in rest for row in part]
        found.append(_line(f"{len(rest)} smaller ones", left, is_one=False))
    return [*found, _line(_TOTAL, rows, is_one=False)]


def _parts(rows: Sequence[Row], by: str, max_rows: int | None) -> dict[str, list[Row]]:
    """Rows by what they have in common."""
    for level in BY[1:] if by == "auto" else (by,):
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(_common(row.path, level), []).append(row)
        if max_rows is None or len(found) <= max_rows:
            break
    return found


def _common(path: str, level: str) -> str:
    """What the leaves of one line have in common: `encoder/layers_3/up/kernel` is of the layer
    `encoder/layers_3/up`, of the block `encoder/layers_3`.
    """
    names = path.split("/")
    if level == "leaf" or len(names) == 1:
        return path
    if level == "block":
        numbered = (i for i, name in enumerate(names[:-1]) if re.search(r"\d", name))
        return "/".join(names[: next(numbered, 0) + 1])
    return "/".join(names[:-1])


def _line(name: str, rows: Sequence[Row], *, is_one: bool | None = None) -> Line:
    size = sum(row.size for row in rows)
    dense, now = (sum(getattr(row, x) for row in rows) for x in ("bytes_dense", "bytes_now"))
    zeros = sum(row.sparsity * row.size for row in rows) / size if size else 0.0
    dtypes = list(dict.fromkeys(_SHORT.sub(lambda m: _LETTERS[m[0]], row.dtype) for row in rows))
    one = len(rows) == 1 and rows[0].path == name if is_one is None else is_one
    if one:
        shape, name = _sizes(rows[0]), name or "(the array)"
    else:
        shape = f"{size:,} in {len(rows)}"
    return Line(
        name,
        shape,
        " ".join(dtypes),
        f"{zeros:.1%}",
        f"{8 * now / size:.2f}" if size else "",
        human_bytes(dense),
        human_bytes(now),
        _ratio(dense, now),
    )


def _sizes(row: Row) -> str:
    """`3×3×32`, and after an arrow the axes that shrank."""
    pairs = zip(row.shape, row.shape_now, strict=True)
    return "×".join(str(a) if a == b else f"{a}→{b}" for a, b in pairs) or "scalar"


def _ratio(before: int, now: int) -> str:
    return f"{before / now:.2f}x" if now else "-"


def human_bytes(count: float) -> str:
    """`1.5 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
