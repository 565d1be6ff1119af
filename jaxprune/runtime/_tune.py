"""Measuring which lowering is fastest on this machine."""

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._progress import track
from jaxprune.program import Layout
from jaxprune.quantize import quantize_tree
from jaxprune.runtime._lowerings import run
from jaxprune.runtime._rules import Kind
from jaxprune.runtime._tuning import DEFAULTS, VERSION, Thresholds, tuning_file
from jaxprune.sparse import SparseArray

_KINDS: dict[Kind, tuple[dict[str, Any], tuple[str, ...]]] = {
    Kind.INTEGER: ({"bits": 8}, ("int8_split", "converted", "blocked")),
    Kind.PACKED_INTEGER: ({"bits": 4}, ("int8_split", "converted", "blocked")),
    Kind.GROUPED_INTEGER: (
        {"bits": 8, "group_size": 128},
        ("groups", "blocked", "blocked_int8_split", "dense"),
    ),
    Kind.NF4_LEVEL: ({"dtype": "nf4"}, ("blocked", "blocked_int8_split", "dense")),
    Kind.NUMBER: ({"dtype": "float8_e4m3fn"}, ("blocked", "blocked_int8_split", "converted")),
    Kind.NM_VALUE: ({}, ("blocked_int8_split", "dense")),
}


def tune(
    *, width: int = 2048, rows: tuple[int, ...] = (1, 8, 32, 128, 512), rounds: int = 5
) -> dict[Kind, dict[str, dict[int, float]]]:
    """Times every lowering on matrices of this machine's default backend, and keeps the fastest.

    The thresholds go to `tuning.json` in the user's cache folder (or where `JAXPRUNE_TUNING` says), and
    `jp.compressed` uses them from then on. A lowering replaces the default only where it is at least
    a twentieth faster.

    Args:
      width: of the square matrices, a multiple of 128.
      rows: numbers of rows to measure, ascending.
      rounds: repetitions, of which the median counts.

    Returns:
      Seconds by kind of codes, lowering and rows.

    Raises:
      ValueError: a width that is no multiple of 128.
    """
    if width <= 0 or width % 128:
        raise ValueError(f"width: expected a multiple of 128, got {width}")
    backend = jax.default_backend()
    base = DEFAULTS["cpu" if backend == "cpu" else "other"]
    w = jax.random.normal(jax.random.key(0), (width, width))
    seconds: dict[Kind, dict[str, dict[int, float]]] = {}
    rules: Thresholds = {}
    for kind, (settings, names) in track(_KINDS.items(), "tune"):
        array = _leaf(kind, w, settings)
        found = {name: {n: _time(name, array, n, rounds) for n in rows} for name in names}
        seconds[kind] = found
        rules[kind] = _rules(found, base[kind], rows)
    file = tuning_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads(file.read_text())
        others = known["platforms"] if known["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        others = {}
    work = file.with_suffix(".tmp")
    content = {"version": VERSION, "platforms": {**others, backend: rules}}
    work.write_text(json.dumps(content, indent=1))
    work.replace(file)
    return seconds


def _leaf(kind: Kind, w: jax.Array, settings: dict[str, Any]) -> Any:
    """A matrix in one kind of codes."""
    if kind == Kind.NM_VALUE:
        return SparseArray.of(w, jnp.arange(w.shape[0])[:, None] % 2 == 0, 2, 4, -2)
    return quantize_tree({"w": w}, **settings)["w"]


def _time(name: str, array: Any, rows: int, rounds: int) -> float:
    n = array.shape[0]
    layout = Layout((n, n), (), (0,), (1,), (rows,))
    call = jax.jit(lambda x, w: run(name, x, w, layout, None))
    x = jnp.ones((rows, n))
    jax.block_until_ready(call(x, array))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call(x, array))
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _rules(
    found: dict[str, dict[int, float]], base: list[tuple[int, str]], rows: tuple[int, ...]
) -> list[tuple[int, str]]:
    """The fastest by rows, neighbours with the same lowering joined."""
    rules: list[tuple[int, str]] = []
    for n in rows:
        default = next(name for most, name in base if n <= most or most < 0)
        best = min(found, key=lambda name: found[name][n])
        if default in found and found[best][n] > 0.95 * found[default][n]:
            best = default
        if rules and rules[-1][1] == best:
            rules[-1] = (n, best)
        else:
            rules.append((n, best))
    rules[-1] = (-1, rules[-1][1])
    return rules
