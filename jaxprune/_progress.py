"""Progress bars of loops that take long: on a terminal, or as `JAXPRUNE_PROGRESS` (`1`, `0`) says."""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], name: str) -> Iterator[T]:
    """Iterates over `items` under a progress bar that goes when they end."""
    from rich.console import Console  # slow to import: when something takes long
    from rich.progress import track as bar

    switch = os.environ.get("JAXPRUNE_PROGRESS")
    shown = Console().is_terminal if switch not in ("0", "1") else switch == "1"
    yield from bar(items, name, transient=True, disable=not shown)
