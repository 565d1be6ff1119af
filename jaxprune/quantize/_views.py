"""Other shapes of quantized arrays: what becomes of their scales.

Along every axis of an array there is one scale, one per entry, or one per group of entries; the last
group of a `Spec.padded_axis` may be shorter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def leading_block(x: Array, n: int, start: Any, size: int, length: int | None = None) -> Array:
    """What belongs to `size` entries, from `start`, of a leading axis of `n`, at whole groups of `length`
    (by default as many as `x` has).
    """
    if x.shape[0] == 1 != n:
        return x
    length = n // x.shape[0] if length is None or x.shape[0] == n else length
    return jax.lax.dynamic_slice_in_dim(x, start // length, -(-size // length))


def reshaped_scales(
    old: tuple[int, ...], new: tuple[int, ...], scales: tuple[int, ...], *, kept: int
) -> Callable[[Array], Array] | None:
    """How scales follow a reshape of their array; `None` where one scale's entries would part.

    Args:
      old, new: shapes of the array.
      scales: shape of its scales.
      kept: last axes that must stay what they are.
    """
    if not old or not new or np.prod(old) != np.prod(new) or 0 in old:
        return None
    if kept and old[-kept:] != new[-kept:]:
        return None
    wanted = [1] * len(new)
    for mine, theirs in _matched(old, new):
        had = [scales[i] for i in mine]
        if len(mine) == len(theirs) == 1:
            in_groups = had[0] not in (1, old[mine[0]])
            # groups lie along one axis, counted from the end; of vectors it is another
            same_axis = mine[0] - len(old) == theirs[0] - len(new)
            if in_groups and not (same_axis and len(old) > 1 and len(new) > 1):
                return None
            wanted[theirs[0]] = had[0]
        elif had == [old[i] for i in mine]:
            for i in theirs:
                wanted[i] = new[i]
        elif any(n != 1 for n in had):
            # one scale for each entry of the first axes: groups, where groups lie
            first = next((i for i, n in enumerate(had) if n == 1), len(had))
            whole = had == [old[i] for i in mine[:first]] + [1] * (len(mine) - first)
            if not whole or theirs != [len(new) - 2]:
                return None
            wanted[theirs[0]] = int(np.prod(had))
    # of three axes and more, each entry of the leading axis has scales of its own, for loops over it
    full = (new[0], *wanted[1:]) if len(new) >= 3 and wanted[0] == 1 else tuple(wanted)
    return lambda x: jnp.broadcast_to(x.reshape(wanted), full)


def _matched(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The axes of a reshape that hold the same entries, in order; axes of size 1 left out."""
    left = [i for i, n in enumerate(old) if n != 1]
    right = [i for i, n in enumerate(new) if n != 1]
    found = []
    while left:
        mine, theirs = [left.pop(0)], [right.pop(0)]
        a, b = old[mine[0]], new[theirs[0]]
        while a != b:
            if a < b:
                mine.append(left.pop(0))
                a *= old[mine[-1]]
            else:
                theirs.append(right.pop(0))
                b *= new[theirs[-1]]
        found.append((mine, theirs))
    return found
