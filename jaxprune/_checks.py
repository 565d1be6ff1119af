"""Argument checks in one voice: parameter, what was expected, what came, the leaf, the cure.

All of them look at types, shapes and concrete values only, so they run before any array work and
also under `jit`, where a traced value passes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxprune._trees import flatten
from jaxprune._types import PyTree, is_compressed


def is_traced(x: Any) -> bool:
    """Whether `x` has no concrete value yet."""
    return isinstance(x, Tracer)


def flagged(paths: Sequence[str], flags: Sequence[Any], *, value: bool = True) -> list[str]:
    """The paths whose flag is `value`, read from the device at once; none where a flag is traced."""
    if any(is_traced(flag) for flag in flags):
        return []
    found = jax.device_get(list(flags))
    return [path for path, flag in zip(paths, found, strict=True) if bool(flag) == value]


def fraction(name: str, value: Any) -> None:
    """Checks that a concrete `value` is a number in [0, 1]; a traced scalar passes."""
    if np.ndim(value) != 0:
        raise ValueError(f"{name}: expected a scalar in [0, 1], got shape {np.shape(value)}")
    if is_traced(value):
        return
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(f"{name}: expected a number in [0, 1], got {type(value).__name__}")
    if not 0.0 <= float(value) <= 1.0:
        hint = " (a fraction, not per cent)" if float(value) > 1 else ""
        raise ValueError(f"{name}: expected a number in [0, 1]{hint}, got {float(value)}")


def positive_int(name: str, value: Any, *, least: int = 1) -> None:
    """Checks that `value` is a Python integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")


def positive(name: str, value: Any) -> None:
    """Checks that a concrete `value` is a finite number above 0; a traced scalar passes."""
    if not is_traced(value) and not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def choice(name: str, value: Any, options: tuple[Any, ...]) -> None:
    """Checks that `value` is one of `options`."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def aligned(name: str, tree: PyTree, reference_name: str, reference: PyTree) -> PyTree:
    """A tree in the containers of another, by the paths of its leaves; an error where those differ."""
    got, leaves, theirs = flatten(tree)
    wanted, _, ours = flatten(reference)
    if theirs == ours:
        return tree
    if len(got) == len(wanted) == len(set(got)) and set(got) == set(wanted):
        by_path = dict(zip(got, leaves, strict=True))
        return ours.unflatten([by_path[path] for path in wanted])
    missing = [path for path in wanted if path not in set(got)]
    extra = [path for path in got if path not in set(wanted)]
    detail = "; ".join(
        text
        for text in (
            f"missing {_some(missing)}" if missing else "",
            f"unexpected {_some(extra)}" if extra else "",
            f"several leaves of one path: {_short(theirs)} against {_short(ours)}"
            if not missing and not extra
            else "",
        )
        if text
    )
    raise ValueError(
        f"{name}: expected a tree with the structure of {reference_name}, {detail}. "
        f"Build it from the same {reference_name}"
    )


def broadcasts(name: str, path: str, shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Checks that an array of `shape` broadcasts to exactly `target`."""
    try:
        fits = np.broadcast_shapes(shape, target) == tuple(target)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: leaf {path!r} has shape {tuple(shape)}, which does not broadcast to its "
            f"parameter's {tuple(target)}; build {name} from these parameters"
        )


def all_dense(name: str, tree: PyTree, cure: str) -> None:
    """Checks that a tree has no compressed leaves."""
    for path, leaf in zip(*flatten(tree)[:2], strict=True):
        if is_compressed(leaf):
            raise TypeError(
                f"{name}: leaf {path!r} is a {type(leaf).__name__}, expected a dense array; {cure}, or "
                f"make it dense first: jp.materialize_tree({name})"
            )


def masks_fit(masks: PyTree, params: PyTree) -> PyTree:
    """Masks in the containers of `params`, checked: bools that broadcast, leaf by leaf."""
    masks = aligned("masks", masks, "params", params)
    paths, leaves, treedef = flatten(params)
    for path, leaf, mask in zip(paths, leaves, treedef.flatten_up_to(masks), strict=True):
        dtype = np.dtype(getattr(mask, "dtype", type(mask)))
        if dtype != np.bool_ or is_compressed(mask):
            raise TypeError(
                f"masks: leaf {path!r} has dtype {dtype}, expected bool (True = keep); "
                "compare scores with a threshold, or use masks.from_scores"
            )
        broadcasts("masks", path, np.shape(mask), np.shape(leaf))
    return masks


def _some(paths: list[str]) -> str:
    shown = ", ".join(repr(path) for path in paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _short(treedef: Any) -> str:
    text = str(treedef)
    return text if len(text) <= 120 else text[:117] + "..."
