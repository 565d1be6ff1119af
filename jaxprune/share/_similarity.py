"""How alike equally shaped weights are."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Where

MEASURES = ("cosine", "aligned", "cka")


class Similarity(NamedTuple):
    """Two weights compared.

    Attributes:
      first, second: paths; of layers in a stack, `path[i]`.
      value: at most 1, which is equality up to scale (and order, for `"aligned"`).
    """

    first: str
    second: str
    value: float


class Piece(NamedTuple):
    """A weight, or one layer of a stack.

    Attributes: name, leaf and layer (or `None`); x: the array; stat: its `Stats`, or `None`.
    """

    name: str
    leaf: int
    layer: int | None
    x: np.ndarray
    stat: Any


def similarities(
    params: Params,
    *,
    measure: str = "cosine",
    stats: PyTree | None = None,
    layers: Where = (),
    where: Where = None,
) -> list[Similarity]:
    """How alike all pairs of equally shaped weights are, most alike first.

    Args:
      params: any tree of arrays.
      measure: `"cosine"` of the weights; `"aligned"`, the cosine after the best permutation of the last
        axis; `"cka"`, linear CKA of what both make of the same inputs.
      stats: of `jp.calibrate` with `second_moment=True`, on the same tree; `"cka"` needs it.
      layers: stacks whose layers (entries of the leading axis) are compared with each other.
      where: which other leaves; by default the weights, see `jp.quantize_tree`.

    Returns:
      Pairs and values; `jp.share.similarity_table` shows them.

    Raises:
      ValueError: an unknown measure, statistics missing.

    Example:
      >>> params = {"a": jnp.eye(3), "b": 2 * jnp.eye(3), "c": jnp.ones((3, 2))}
      >>> jp.share.similarities(params)
      [Similarity(first='a', second='b', value=1.0)]

    References: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019,
    https://arxiv.org/abs/1905.00414 (CKA); Ainsworth et al., "Git Re-Basin", 2022,
    https://arxiv.org/abs/2209.04836 (alignment)
    """
    pieces = pieces_of(params, stats, layers, where)
    found = [
        Similarity(a.name, b.name, round(value, 6))
        for group in alike_shapes(pieces)
        for a, b, value in _pairs(group, measure)
    ]
    return sorted(found, key=lambda s: -s.value)


def similarity_table(found: list[Similarity], *, most: int = 20) -> Table:
    """Similarities as a `rich` table, most alike first.

    Args:
      found: of `similarities`.
      most: rows at most.

    Returns:
      The table.

    Example:
      >>> params = {"a": jnp.eye(3), "b": jnp.eye(3)}
      >>> jp.share.similarity_table(jp.share.similarities(params)).row_count
      1
    """
    table = Table(title="Similar weights", caption=f"{max(len(found) - most, 0)} more pairs")
    for column in ("first", "second", "similarity"):
        table.add_column(column, overflow="fold")
    for pair in found[:most]:
        table.add_row(pair.first, pair.second, f"{pair.value:.4f}")
    return table


def pieces_of(params: Params, stats: PyTree | None, layers: Where, where: Where) -> list[Piece]:
    """The weights to compare."""
    paths, leaves, treedef = _trees.flatten(params)
    stacks = _trees.select(params, layers) if not _is_empty(layers) else [False] * len(leaves)
    chosen = _trees.select(params, where)
    known = [None] * len(leaves) if stats is None else treedef.flatten_up_to(stats)
    found: list[Piece] = []
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if not (stacks[i] or chosen[i]):
            continue
        x = _trees.dense(leaf)
        if _checks.is_traced(x):
            raise ValueError(f"params: leaf {path!r} is traced; tie outside of jit")
        host = np.asarray(x, np.float32)
        if not np.isfinite(host).all():
            raise ValueError(
                f"params: leaf {path!r} holds NaN or infinity; leave it out with where="
            )
        if stacks[i]:
            found += [Piece(f"{path}[{k}]", i, k, layer, None) for k, layer in enumerate(host)]
        else:
            found.append(Piece(path, i, None, host, known[i]))
    return found


def _is_empty(where: Where) -> bool:
    return isinstance(where, tuple | list) and not where


def alike_shapes(pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces that may be one tensor: of one shape and, of layers, one stack."""
    groups: dict[Any, list[Piece]] = {}
    for piece in pieces:
        stack = None if piece.layer is None else piece.leaf
        groups.setdefault((piece.x.shape, stack), []).append(piece)
    return list(groups.values())


def matrix_of(group: list[Piece], measure: str) -> np.ndarray:
    """Similarities of all pairs of a group, symmetric."""
    found = np.eye(len(group))
    place = {piece.name: i for i, piece in enumerate(group)}
    for a, b, value in _pairs(group, measure):
        found[place[a.name], place[b.name]] = found[place[b.name], place[a.name]] = value
    return found


def _pairs(group: list[Piece], measure: str) -> Iterator[tuple[Piece, Piece, float]]:
    _checks.choice("measure", measure, MEASURES)
    if measure == "cosine" and len(group) > 1:
        rows = np.stack([piece.x.ravel() for piece in group]).astype(np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        products = rows @ rows.T
        for i, a in enumerate(group):
            for j in range(i + 1, len(group)):
                yield a, group[j], float(products[i, j])
        return
    for i, a in enumerate(group):
        for b in group[i + 1 :]:
            yield a, b, _aligned(a, b)[1] if measure == "aligned" else _cka(a, b)


def best_order(source: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Places along the last axis of `source` that make it most like `x`."""
    from scipy.optimize import linear_sum_assignment  # slow to import: when it is used

    a, b = (y.reshape(-1, y.shape[-1]).astype(np.float64) for y in (source, x))
    rows, columns = linear_sum_assignment(b.T @ a, maximize=True)
    return columns[np.argsort(rows)]


def _aligned(a: Piece, b: Piece) -> tuple[np.ndarray, float]:
    order = best_order(a.x, b.x)
    moved = a.x[..., order].ravel().astype(np.float64)
    other = b.x.ravel().astype(np.float64)
    size = np.linalg.norm(moved) * np.linalg.norm(other)
    return order, float(moved @ other / max(size, 1e-30))


def _cka(a: Piece, b: Piece) -> float:
    (x, s), (y, t) = _with_moment(a), _with_moment(b)
    moment = (s + t) / 2
    cross = lambda p, q: float(np.square(p.T @ moment @ q).sum())
    return cross(x, y) / max((cross(x, x) * cross(y, y)) ** 0.5, 1e-300)


def _with_moment(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    stat = piece.stat
    if stat is None or stat.second_moment is None or np.ndim(stat.count):
        raise ValueError(
            f"stats: 'cka' needs the second moment of what multiplies {piece.name!r}; calibrate with "
            "second_moment=True, and select plain (not stacked) weights"
        )
    x = np.asarray(piece.x, np.float64)
    axes = [axis % x.ndim for axis in stat.axes]
    rest = [i for i in range(x.ndim) if i not in axes]
    features = int(np.prod([x.shape[i] for i in axes]))
    matrix = x.transpose(*axes, *rest).reshape(features, -1)
    return matrix, np.asarray(stat.second_moment, np.float64)
