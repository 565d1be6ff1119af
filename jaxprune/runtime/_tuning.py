"""Which lowering is fastest for each kind of codes and number of rows: defaults, and what was measured.

Measured on CPU (`benchmarks/compressed.py`, `jaxprune tune`), for each JAX: products of few rows wait for
memory, so that codes become floats block by block in the cache; of more rows an integer product of 8-bit
codes runs several times faster than a float one, and two int8 parts of activations make it precise and
still faster. Codes that are no integers, or whose scales differ within a sum, become numbers block by
block; few codewords are split again where rows are few. Compilers for GPU and TPU fuse the conversion of
codes into a float product.
"""

import json
import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jaxprune.runtime._lowerings import LOWERINGS
from jaxprune.runtime._rules import INTEGERS, Kind

VERSION = 2

Thresholds = dict[Kind, list[tuple[int, str]]]
"""Per kind of codes: up to so many rows, such a lowering; the last has no bound (-1)."""

_INTEGERS: list[tuple[int, str]] = [(4, "blocked"), (-1, "int8_split")]
_SPLITS: list[tuple[int, str]] = [(64, "blocked_int8_split"), (-1, "blocked")]
_BEFORE_0_11: Thresholds = {  # products of single rows are slow there unless they are of integers
    Kind.INTEGER: [(1, "int8_split"), *_INTEGERS],
    Kind.PACKED_INTEGER: [(1, "int8_split"), *_INTEGERS],
    Kind.GROUPED_INTEGER: [(1, "groups"), (-1, "blocked")],
    Kind.NF4_LEVEL: _SPLITS,
    Kind.FEW_CODEWORDS: _SPLITS,
    Kind.NM_VALUE: [(8, "dense"), (64, "blocked_int8_split"), (-1, "dense")],
}

DEFAULTS: dict[str, Thresholds] = {
    "cpu": {
        Kind.INTEGER: _INTEGERS,
        Kind.PACKED_INTEGER: _INTEGERS,
        Kind.INTEGER_CODEWORD: [(-1, "int8_split")],
        Kind.GROUPED_INTEGER: [(-1, "blocked")],
        Kind.NUMBER: [(-1, "blocked")],
        Kind.VALUE: [(-1, "blocked")],
        Kind.NF4_LEVEL: [(4, "blocked"), *_SPLITS],
        Kind.FEW_CODEWORDS: [(4, "blocked"), *_SPLITS],
        Kind.MANY_CODEWORDS: [(-1, "blocked")],
        Kind.NM_VALUE: [(1, "blocked"), (64, "blocked_int8_split"), (-1, "dense")],
        **(_BEFORE_0_11 if jax.__version_info__ < (0, 11) else {}),
    },
    "other": {
        kind: [(-1, "converted" if kind in (*INTEGERS, Kind.NUMBER) else "dense")] for kind in Kind
    },
}


def tuning_file() -> Path:
    """Where `jaxprune tune` keeps what it measured: `JAXPRUNE_TUNING`, or the user's cache folder."""
    given = os.environ.get("JAXPRUNE_TUNING")
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jaxprune" / "tuning.json"


def thresholds_for(platform: str, tuning: Any = None) -> Thresholds:
    """The thresholds of a platform.

    Args:
      platform: `"cpu"`, `"gpu"`, `"tpu"`.
      tuning: `None` for this machine's file, a path, or thresholds by kind; what they lack is default.

    Raises:
      ValueError: thresholds given here that name an unknown kind or lowering.
    """
    base = DEFAULTS["cpu" if platform == "cpu" else "other"]
    if isinstance(tuning, Mapping):
        return {**base, **parsed(tuning)}
    file = tuning_file() if tuning is None else Path(tuning)
    return {**base, **_measured(file, platform, _changed(file))}


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@cache
def _measured(file: Path, platform: str, changed: int) -> Thresholds:
    """What a file holds; nothing, with a warning, where it does not fit this version."""
    if not changed:
        return {}
    try:
        content = json.loads(file.read_text())
        if content.get("version") != VERSION:
            raise ValueError(f"version {content.get('version')!r}, expected {VERSION}")
        return parsed(content["platforms"].get(platform, {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"tuning: {file} is ignored ({error}); measure anew with `jaxprune tune`, or delete it",
            stacklevel=2,
        )
        return {}


def parsed(rules: Mapping[str, Any]) -> Thresholds:
    """Thresholds from plain data.

    Raises:
      ValueError: an unknown kind or lowering, rows that do not ascend, or no last rule without bound.
    """
    found: Thresholds = {}
    for kind, pairs in rules.items():
        if kind not in [k.value for k in Kind]:
            raise ValueError(
                f"tuning: unknown kind {kind!r}, expected one of {[k.value for k in Kind]}"
            )
        own = [(int(most), str(name)) for most, name in pairs]
        for _, name in own:
            if name not in LOWERINGS:
                raise ValueError(f"tuning: unknown lowering {name!r} of {kind!r}")
        bounds = [most for most, _ in own]
        if (
            not own
            or bounds[-1] >= 0
            or bounds[:-1] != sorted(set(bounds[:-1]))
            or min(bounds) < -1
        ):
            raise ValueError(
                f"tuning: {kind!r} needs ascending rows and a last rule for -1 (no bound)"
            )
        found[Kind(kind)] = own
    return found
