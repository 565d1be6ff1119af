"""Weight tying: alike weights become one tensor."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Where
from jaxprune.share._decompose import low_rank
from jaxprune.share._similarity import Piece, alike_shapes, best_order, matrix_of, pieces_of
from jaxprune.share._tied import TiedArray, TiedLayers


def tie_tree(
    params: Params,
    *,
    threshold: float | None = None,
    budget: float | None = None,
    ties: Sequence[Sequence[str]] | None = None,
    measure: str = "cosine",
    stats: PyTree | None = None,
    scale: bool = False,
    rank: int | None = None,
    layers: Where = (),
    where: Where = None,
) -> PyTree:
    """Lets alike weights be one tensor: their mean.

    Weights are joined pair by pair, most alike first; a set of weights is as alike as its least alike
    pair.

    Args:
      params: any tree of arrays.
      threshold: join what is at least so similar. Exactly one of `threshold`, `budget` and `ties` is
        given.
      budget: fraction in (0, 1] of the selected weights' parameters that remains in all.
      ties: groups of paths to join, whatever their similarity.
      measure: `"cosine"`, `"aligned"` (the last axis is put in the best order, which each tie keeps) or
        `"cka"`; see `jp.share.similarities`.
      stats: for `"cka"`.
      scale: give each tied weight a scale of its own, the best; opposite weights then count as alike.
      rank: give each tied leaf what it lacks as a product of this rank (not layers of stacks).
      layers: stacks whose layers (entries of the leading axis) are joined with each other.
      where: which other leaves; by default the weights, see `jp.quantize_tree`.

    Returns:
      The tree with `TiedArray` leaves in the places of tied ones (`TiedLayers` for stacks), which
      `jp.compressed` takes as it is; `jp.share.resolve_ties` gives the tree that other functions take.

    Raises:
      ValueError: not one target; ties of unequal shapes or of unknown paths; a budget that cannot be met;
        NaN or infinity.

    Example:
      >>> params = {"a": jnp.eye(2), "b": jnp.eye(2) * 1.1, "c": -jnp.eye(2)}
      >>> jp.share.ties(jp.tie_tree(params, threshold=0.99))
      {'b': 'a'}

    References: Lan et al., ALBERT, 2019, https://arxiv.org/abs/1909.11942; Bae et al., "Relaxed Recursive
    Transformers", 2024, https://arxiv.org/abs/2410.20672 (low-rank deltas)
    """
    targets = {"threshold": threshold, "budget": budget, "ties": ties}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"threshold, budget, ties: expected exactly one, got {given or 'none'}")
    if budget is not None:
        _checks.fraction("budget", budget)
    if rank is not None:
        _checks.positive_int("rank", rank)
    paths, leaves, treedef = _trees.flatten(params)
    if ties is not None:
        groups = _explicit(paths, leaves, ties)
    else:
        pieces = pieces_of(params, stats, layers, where)
        groups = _joined(pieces, measure, threshold, budget, signed=not scale)
    out = list(leaves)
    stacks: dict[int, list[list[Piece]]] = {}
    for group in groups:
        if group[0].layer is not None:
            stacks.setdefault(group[0].leaf, []).append(group)
        elif len(group) > 1:
            _tie(out, group, paths, leaves, measure == "aligned", scale, rank)
    for leaf, parts in stacks.items():
        if any(len(part) > 1 for part in parts):
            out[leaf] = _tied_layers(parts, leaves[leaf].dtype, scale)
    return treedef.unflatten(out)


def _explicit(
    paths: list[str], leaves: list[Any], ties: Sequence[Sequence[str]]
) -> list[list[Piece]]:
    place = {path: i for i, path in enumerate(paths)}
    groups, seen = [], set()
    for names in ties:
        if isinstance(names, str) or len(names) < 2:
            raise ValueError(f"ties: expected groups of at least two paths, got {names!r}")
        for name in names:
            if name not in place:
                raise ValueError(_trees.no_match(name, paths, parameter="ties"))
            if name in seen:
                raise ValueError(f"ties: {name!r} is in two groups; join them to one")
            seen.add(name)
        shapes = {name: tuple(np.shape(leaves[place[name]])) for name in names}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{name!r} {shape}" for name, shape in shapes.items())
            raise ValueError(f"ties: weights of unequal shapes cannot be one tensor: {listed}")
        groups.append(
            [
                Piece(
                    n, place[n], None, np.asarray(_trees.dense(leaves[place[n]]), np.float32), None
                )
                for n in names
            ]
        )
    return groups


def _joined(
    pieces: list[Piece],
    measure: str,
    threshold: float | None,
    budget: float | None,
    *,
    signed: bool,
) -> list[list[Piece]]:
    """Groups of pieces, by complete linkage."""
    groups: list[list[Piece]] = []
    kinds = alike_shapes(pieces)
    matrices = [matrix_of(kind, measure) for kind in kinds]
    matrices = matrices if signed else [np.abs(matrix) for matrix in matrices]
    members = [[[i] for i in range(len(kind))] for kind in kinds]
    total = sum(piece.x.size for piece in pieces)
    held = total
    for matrix in matrices:
        np.fill_diagonal(matrix, -np.inf)
    while True:
        best = [(float(m.max(initial=-np.inf)), k) for k, m in enumerate(matrices)]
        value, kind = max(best, default=(-np.inf, -1))
        enough = threshold is not None and value < threshold
        met = budget is not None and held <= budget * total
        if enough or met or value == -np.inf:
            if budget is not None and held > budget * total:
                raise ValueError(
                    f"budget: {budget} cannot be met: with all equally shaped weights tied "
                    f"{held / total:.3f} remain; select others with where= or layers="
                )
            break
        matrix = matrices[kind]
        a, b = np.unravel_index(int(matrix.argmax()), matrix.shape)
        worst = np.minimum(matrix[a], matrix[b])
        matrix[a], matrix[:, a] = worst, worst
        matrix[b], matrix[:, b] = -np.inf, -np.inf
        matrix[a, a] = -np.inf
        members[kind][a] += members[kind][b]
        members[kind][b] = []
        held -= kinds[kind][0].x.size
    for kind, parts in zip(kinds, members, strict=True):
        groups += [[kind[i] for i in sorted(part)] for part in parts if part]
    return groups


def _mean(
    pieces: list[Piece], aligned: bool, scale: bool
) -> tuple[np.ndarray, list[Any], list[float]]:
    """The tensor that pieces share, the order in which each reads it, and its scale."""
    orders: list[Any] = [None]
    xs = [pieces[0].x.astype(np.float64)]
    for piece in pieces[1:]:
        order = best_order(piece.x, pieces[0].x) if aligned else None
        xs.append(
            piece.x.astype(np.float64) if order is None else piece.x[..., order].astype(np.float64)
        )
        inverse = None if order is None else np.argsort(order)
        orders.append(None if inverse is None else tuple(int(i) for i in inverse))
    if not scale:
        return np.mean(xs, axis=0), orders, [1.0] * len(xs)
    sign = lambda x: -1.0 if float((x * xs[0]).sum()) < 0 else 1.0
    sizes = [sign(x) * max(float(np.linalg.norm(x)), 1e-30) for x in xs]
    shape = np.mean([x / n for x, n in zip(xs, sizes, strict=True)], axis=0)
    shape = shape * sizes[0] / max(float(np.linalg.norm(shape)), 1e-30)
    norm = max(float(np.square(shape).sum()), 1e-30)
    return shape, orders, [float((x * shape).sum()) / norm for x in xs]


def _tie(
    out: list[Any],
    group: list[Piece],
    paths: list[str],
    leaves: list[Any],
    aligned: bool,
    scale: bool,
    rank: int | None,
) -> None:
    shared, orders, scales = _mean(group, aligned, scale)
    first = group[0]
    shared = shared * (scales[0] if scale else 1.0)
    dtype = leaves[first.leaf].dtype
    out[first.leaf] = jnp.asarray(shared, dtype)
    for piece, order, factor in zip(group[1:], orders[1:], scales[1:], strict=True):
        factor = factor / scales[0] if scale and scales[0] else factor
        left = right = None
        if rank is not None:
            seen = shared if order is None else shared[..., np.asarray(order)]
            rest = (piece.x - factor * seen).reshape(-1, piece.x.shape[-1]).astype(np.float32)
            if rank > min(rest.shape):
                raise ValueError(
                    f"rank: {rank} is more than the full rank {min(rest.shape)} of leaf {piece.name!r}"
                )
            left, right = (jnp.asarray(part, dtype) for part in low_rank(rest, rank, None))
        own, path = leaves[piece.leaf], paths[piece.leaf]
        number = jnp.asarray(factor, jnp.float32) if scale else None
        shape, dtype = tuple(own.shape), np.dtype(own.dtype)
        out[piece.leaf] = TiedArray(
            number, left, right, paths[first.leaf], path, shape, order, dtype
        )


def _tied_layers(parts: list[list[Piece]], dtype: Any, scale: bool) -> TiedLayers:
    count = sum(len(part) for part in parts)
    owner, factors, shared = [0] * count, np.ones(count, np.float32), []
    for number, part in enumerate(parts):
        mean, _, scales = _mean(part, False, scale)
        shared.append(mean)
        for piece, factor in zip(part, scales, strict=True):
            assert piece.layer is not None
            owner[piece.layer], factors[piece.layer] = number, factor
    return TiedLayers(
        jnp.asarray(np.stack(shared), dtype), jnp.asarray(factors) if scale else None, tuple(owner)
    )
