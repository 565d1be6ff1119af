"""Leaves that groups do not divide: what becomes of them, and one warning about all."""

import warnings
from typing import Any

from jaxprune._uses import Uses
from jaxprune.quantize._spec import Spec, fitted

_SHOWN = 20  # leaves that a warning lists for each cure
_DONE = {
    "pad": "groups of {size}, the last one padded",
    "channel": "one scale per channel",
    "dense": "left dense",
}


class Misfits:
    """Fits specs to leaves, and keeps those that groups do not divide."""

    def __init__(self) -> None:
        """Empty."""
        # by path and shape: group size, what was done, and the leaf in words
        self._found: dict[tuple[str, tuple[int, ...]], tuple[int, str, str]] = {}

    def fit(
        self, spec: Spec, path: str, leaf: Any, uses: Uses | None = None, *, is_read: bool = False
    ) -> Spec | None:
        """The spec as the leaf has it, or `None` where it stays dense; see `fitted`."""
        shape = tuple(leaf.shape)
        found, instead = fitted(spec, path, shape, uses, is_read=is_read)
        if instead:
            axis = None if found is None else found.group_axis
            where = f" along axis {axis}" if instead == "pad" else ""
            note = (spec.group_size or 0, instead, f"{path!r} {shape}{where}")
            self._found.setdefault((path, shape), note)
        return found

    def tell(self, stacklevel: int = 3) -> None:
        """Warns once, of all of them."""
        if not self._found:
            return
        parts: dict[tuple[int, str], list[str]] = {}
        for size, instead, text in self._found.values():
            parts.setdefault((size, instead), []).append(text)
        told = []
        for (size, instead), texts in parts.items():
            more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
            told.append(f"{_DONE[instead].format(size=size)}: {', '.join(texts[:_SHOWN])}{more}")
        sizes = ", ".join(str(size) for size in sorted({size for size, _ in parts}))
        warnings.warn(
            f"group_size: {sizes} does not divide {len(self._found)} leaves; {'; '.join(told)}. "
            "otherwise= says what becomes of such leaves",
            stacklevel=stacklevel,
        )
