"""Scalings of units that a function does not feel.

A *scaling* of a group of units multiplies, unit by unit, the slices of each member by `exp(a t)`, with
one exponent `a` per member and one `t` per unit. That the output does not change to first order,
`sum_m a_m <d out / d slice_m, slice_m> = 0` for every unit, is linear in `a`: all scalings of a group
are the null space of one matrix, whatever operations lie between (ReLU, pooling, depthwise
convolutions, gates, normalisations, attention).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune.graph import Graph, Place, frozen_places, places_of

_PROBES = 4
_NULL = 2e-4  # singular values, relative to the largest, that count as 0
_WHOLE = 0.02  # distance of an exponent from a whole number
_SAME = 1e-3  # relative change of outputs that counts as rounding


class Member(NamedTuple):
    place: Place
    weighs: bool  # a matrix: its range matters


class Scaling(NamedTuple):
    members: list[Member]
    exponents: np.ndarray
    size: int

    def weights(self, sign: float) -> list[Place]:
        """Matrices whose exponents have a sign."""
        pairs = zip(self.members, self.exponents, strict=True)
        return [m.place for m, a in pairs if a * sign > 0 and m.weighs]


def scalings_of(
    graph: Graph, call: Callable[..., Any], leaves: list[Any], *, frozen: bool = False
) -> list[Scaling]:
    """The scalings of each group of units.

    Args:
      graph: of the function.
      call: `leaves -> outputs`.
      leaves: the parameters, in flatten order.
      frozen: also of units that cannot be removed, such as features that a LayerNorm centres.
    """
    pulls = _pulls(call, leaves)
    sets = [(g.size, places_of(graph, g)) for g in graph.groups if g.kind != "layers"]
    found = []
    # of a single unit the whole tensor is scaled, which no statistics of channels speak of
    sets += [(n, places) for n, places in (frozen_places(graph) if frozen else []) if n > 1]
    for size, places in sets:
        members = _members(places, leaves)
        found += [Scaling(members, row, size) for row in _null_space(pulls, members, size)]
    return found


def apply_factors(leaves: list[Any], scaling: Scaling, factors: np.ndarray) -> None:
    for member, exponent in zip(scaling.members, scaling.exponents, strict=True):
        if exponent:
            place, x = member.place, leaves[member.place.leaf]
            each = np.ones(x.shape[place.axis], np.float32)
            each[place.slices] = factors[place.units] ** exponent
            shape = [-1 if i == place.axis else 1 for i in range(x.ndim)]
            leaves[place.leaf] = x * each.reshape(shape)


def with_scaled(leaves: list[Any], wide: list[Any], scalings: list[Scaling]) -> list[Any]:
    """The leaves that scalings changed in `wide`, in their dtypes; the others as they were."""
    pairs = (
        (member.place.leaf, exponent)
        for scaling in scalings
        for member, exponent in zip(scaling.members, scaling.exponents, strict=True)
    )
    touched = {leaf for leaf, exponent in pairs if exponent}
    return [
        jnp.asarray(wide[i], leaf.dtype) if i in touched else leaf for i, leaf in enumerate(leaves)
    ]


def holds(call: Callable[..., Any], leaves: list[Any], wide: list[Any], scaling: Scaling) -> bool:
    """Whether outputs stay the same under some powers of two, which scale without rounding."""
    trial = list(wide)
    apply_factors(trial, scaling, 2.0 ** np.random.default_rng(0).integers(-1, 2, scaling.size))
    cast = [
        jnp.asarray(x, leaf.dtype) if _trees.is_floating(leaf) else leaf
        for x, leaf in zip(trial, leaves, strict=True)
    ]
    pairs = zip(jax.tree.leaves(call(leaves)), jax.tree.leaves(call(cast)), strict=True)
    return all(_alike(was, now) for was, now in pairs)


def _alike(was: Any, now: Any) -> bool:
    if not jnp.issubdtype(jnp.result_type(was), jnp.floating):
        return bool(np.mean(np.asarray(was) == np.asarray(now)) > 0.99)
    near = max(_SAME, 8 * float(jnp.finfo(was.dtype).eps))
    was, now = (np.asarray(x, np.float64) for x in (was, now))
    return float(np.abs(was - now).max(initial=0)) <= near * float(np.abs(was).max(initial=0))


def _members(places: list[Place], leaves: list[Any]) -> list[Member]:
    """Floating leaves that units lie in."""
    return [
        Member(place, np.ndim(leaves[place.leaf]) >= 2)
        for place in places
        if _trees.is_floating(leaves[place.leaf])
    ]


def _pulls(call: Callable[..., Any], leaves: list[Any]) -> list[list[Any]]:
    """For random directions of the output: gradient times weight, leaf by leaf."""
    moving = [i for i, leaf in enumerate(leaves) if _trees.is_floating(leaf)]

    @jax.jit
    def pull(some: list[Any], key: jax.Array) -> list[Any]:
        def outputs(some: list[Any]) -> list[Any]:
            full = list(leaves)
            for i, x in zip(moving, some, strict=True):
                full[i] = x
            outs = jax.tree.leaves(call(full))
            return [x for x in outs if jnp.issubdtype(jnp.result_type(x), jnp.floating)]

        outs, back = jax.vjp(outputs, some)
        keys = jax.random.split(key, max(len(outs), 1))
        ways = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, outs, strict=False)]
        return [g * x for g, x in zip(back(ways)[0], some, strict=True)]

    found = []
    for key in jax.random.split(jax.random.key(0), _PROBES):
        some = pull([jnp.asarray(leaves[i]) for i in moving], key)
        full: list[Any] = [None] * len(leaves)
        for i, x in zip(moving, some, strict=True):
            full[i] = np.asarray(x, np.float64)
        found.append(full)
    return found


def _null_space(pulls: list[list[Any]], members: list[Member], size: int) -> list[np.ndarray]:
    """Exponents, one per member, of the scalings of a group: whole numbers."""
    if len(members) < 2:
        return []
    columns = [
        np.concatenate([_per_unit(full[m.place.leaf], m.place, size) for full in pulls])
        for m in members
    ]
    matrix = np.stack(columns, 1)
    norms = np.linalg.norm(matrix, axis=0)
    live = norms > 1e-12 * max(norms.max(initial=0.0), 1e-300)
    if live.sum() < 2:
        return []
    some = matrix[:, live] / norms[live]
    # every column counts alike; a null vector of the scaled columns is one of the plain, times norms
    _, values, rows = np.linalg.svd(some.T @ some)
    null = rows[np.sqrt(np.maximum(values, 0)) <= _NULL * np.sqrt(values[0])] / norms[live]
    found = []
    for row in _echelon(null):
        whole = np.round(row)
        if np.abs(row - whole).max() <= _WHOLE and set(np.unique(whole)) <= {-1.0, 0.0, 1.0}:
            full = np.zeros(len(members))
            full[live] = whole
            found.append(full)
    return found


def _echelon(rows: np.ndarray) -> np.ndarray:
    """The reduced echelon form: the same space, by vectors of few entries."""
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-300)
    done = 0
    for column in range(rows.shape[1]):
        if done == len(rows):
            break
        best = done + int(np.argmax(np.abs(rows[done:, column])))
        if abs(rows[best, column]) < 1e-3:
            continue
        rows[[done, best]] = rows[[best, done]]
        rows[done] /= rows[done, column]
        for other in range(len(rows)):
            if other != done:
                rows[other] -= rows[other, column] * rows[done]
        done += 1
    return rows[:done]


def _per_unit(x: np.ndarray, place: Place, size: int) -> np.ndarray:
    each = x.sum(axis=tuple(i for i in range(x.ndim) if i != place.axis))
    return np.bincount(place.units, each[place.slices], minlength=size)


def ranges(leaves: list[Any], places: list[Place], size: int) -> np.ndarray:
    """The largest magnitude in each unit's slices."""
    found = np.zeros(size)
    for place in places:
        x = np.abs(leaves[place.leaf])
        each = x.max(axis=tuple(i for i in range(x.ndim) if i != place.axis), initial=0.0)
        np.maximum.at(found, place.units, each[place.slices])
    return found
