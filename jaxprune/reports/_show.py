"""Lines as tables: for terminals, in Markdown, in HTML. Names break between their parts, never within."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table

from jaxprune.reports._lines import HEADER, Line

_TITLE = "Compression report"
_WIDE = 100  # characters of text that is printed to no console
_SHAPE = 14  # of shapes, at least
_WIDTHS = (60, 45, 36, 28, 22, 16, 10)  # of names, in characters


def table_of(
    lines: Sequence[Line], caption: str, console: Any = None, options: Any = None
) -> Table:
    """A `rich` table, the last line as its footer; names and shapes as wide as there is room."""
    found = _table(lines, caption, _WIDTHS[2])
    if console is None:
        return found
    for width in _WIDTHS:
        found = _table(lines, caption, width)
        if (
            Measurement.get(console, options.update(width=10_000), found).maximum
            <= options.max_width
        ):
            break
    return found


def _table(lines: Sequence[Line], caption: str, width: int) -> Table:
    table = Table(title=_TITLE, show_footer=True, caption=caption)
    *body, total = lines
    for name, footer in zip(HEADER, total, strict=True):
        justify: JustifyMethod = "left" if name in ("leaf", "shape", "dtype") else "right"
        cell = _broken(footer, " ", max(width, _SHAPE)) if name == "shape" else footer
        # a part of a name that is longer than there is room is cut in pieces, not off
        table.add_column(
            name, footer=cell, justify=justify, no_wrap=name != "leaf", overflow="fold"
        )
    for line in body:
        name, shape, *rest = line
        parts = (
            _broken(name, "/", width),
            _broken(shape, "×" if "×" in shape else " ", max(width, _SHAPE)),
        )
        table.add_row(*parts, *rest)
    return table


def _broken(name: str, mark: str, width: int) -> str:
    """A name in lines of at most `width` characters, where its parts are that short."""
    found = [""]
    for part in re.findall(f"[^{mark}]*{mark}|[^{mark}]+$", name):
        words = [part] if len(part) <= width else re.findall("[^_]*_|[^_]+$", part)
        for word in words:
            if found[-1] and len(found[-1]) + len(word.rstrip()) > width:
                found.append("")
            found[-1] += word
    return "\n".join(line.rstrip() for line in found)


def text_of(lines: Sequence[Line], caption: str) -> str:
    """Plain text: `_WIDE` characters, or as many as the parts of names need."""
    console = Console(width=_WIDE, color_system=None, force_terminal=False)
    table = table_of(lines, caption, console, console.options)
    needed = Measurement.get(console, console.options.update(width=10_000), table).maximum
    console = Console(width=max(_WIDE, needed), color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def markdown_of(lines: Sequence[Line], caption: str) -> str:
    """A Markdown table, numbers to the right, the total in bold."""
    *body, total = lines
    row = lambda cells: "| " + " | ".join(str(x).replace("|", "\\|") for x in cells) + " |"
    marks = ["---" if x in ("leaf", "shape", "dtype") else "---:" for x in HEADER]
    bold = [f"**{x}**" if x else "" for x in total]
    return "\n".join([*map(row, [HEADER, marks, *body, bold]), "", caption, ""])


def html_of(lines: Sequence[Line], caption: str) -> str:
    """An HTML table, the total in its foot; names may break after slashes."""
    *body, total = lines

    def row(cells: Line, tag: str) -> str:
        shown = [escape(x).replace("/", "/<wbr>") for x in cells]
        return "<tr>" + "".join(f"<{tag}>{x}</{tag}>" for x in shown) + "</tr>"

    return "\n".join(
        [
            "<table>",
            f"<caption>{escape(caption)}</caption>",
            f"<thead>{row(HEADER, 'th')}</thead>",
            "<tbody>",
            *(row(line, "td") for line in body),
            "</tbody>",
            f"<tfoot>{row(total, 'td')}</tfoot>",
            "</table>",
            "",
        ]
    )
