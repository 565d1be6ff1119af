"""What takes long says so: on a terminal, or as `JAXPRUNE_PROGRESS` (`1`, `0`) says."""

import os
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds after which a call says what it does."""


def track(items: Iterable[T], name: str) -> Iterator[T]:
    """Iterates over `items` under a progress bar that goes when they end."""
    from rich.console import Console  # slow to import: when something takes long
    from rich.progress import track as bar

    yield from bar(items, name, transient=True, disable=not _is_shown(Console()))


def _is_shown(console: Any) -> bool:
    switch = os.environ.get("JAXPRUNE_PROGRESS")
    return console.is_terminal if switch not in ("0", "1") else switch == "1"


class Stages:
    """What a call does now; shown once it has taken `PATIENCE` seconds."""

    def __init__(self, name: str) -> None:
        """Of a function of this name."""
        self._name, self._stage = name, ""
        self._lock, self._status = threading.Lock(), None

    def __call__(self, stage: str) -> None:
        """Goes on to another stage."""
        with self._lock:
            self._stage = stage
            if self._status is not None:
                self._status.update(self._text)

    @property
    def _text(self) -> str:
        return f"{self._name}: {self._stage}" if self._stage else self._name

    def show(self) -> None:
        """Begins to say what goes on."""
        from rich.console import Console  # slow to import: when something takes long

        console = Console()
        with self._lock:
            if self._stage is not None and _is_shown(console):
                self._status = console.status(self._text)
                self._status.start()

    def end(self) -> None:
        """Leaves nothing behind on the terminal."""
        with self._lock:
            if self._status is not None:
                self._status.stop()
                self._status = None


@contextmanager
def stages(name: str) -> Generator[Stages]:
    """Says what a call does where it takes longer than `PATIENCE` seconds, stage by stage."""
    found = Stages(name)
    timer = threading.Timer(PATIENCE, found.show)
    timer.daemon = True
    timer.start()
    try:
        yield found
    finally:
        timer.cancel()
        timer.join()  # it may be on its way to show something
        found.end()
