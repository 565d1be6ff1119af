"""Whole trees to clustered leaves and back."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Scores, Where, is_compressed
from jaxprune.share import _kmeans, _vectors
from jaxprune.share._clustered import ClusteredArray

_PRUNED = 0.01  # exact zeros from which on a leaf counts as pruned
_CHEAP = 50  # how much smaller than the indices copies of a codebook must be
_TURNS = 30


@dataclass(frozen=True)
class _How:
    clusters: int
    bits: int
    group_size: int | None
    axis: int
    dim: int
    stages: int
    start: str
    zero: bool | None
    key: jax.Array


def cluster_tree(
    params: Params,
    bits: int = 4,
    *,
    clusters: int | None = None,
    granularity: str = "tensor",
    group_size: int | None = None,
    channel_axis: int = -1,
    dim: int = 1,
    stages: int = 1,
    start: str = "optimal",
    importance: Scores | None = None,
    zero: bool | None = None,
    key: jax.Array | None = None,
    where: Where = None,
) -> PyTree:
    """Lets the weights of each leaf share few values: k-means, and `ClusteredArray` leaves.

    Numbers are clustered by near-exact one-dimensional k-means (dynamic programming over bins, then
    Lloyd's iteration over their sums), vectors by k-means++ and Lloyd's.

    Args:
      params: any tree of arrays; compressed leaves count as what they stand for.
      bits: of an index, 1 to 8.
      clusters: values per codebook, 2 to 256, instead of `bits`. A leaf with fewer distinct values is
        stored exactly, with as few.
      granularity: `"tensor"`, one codebook per leaf, or `"channel"`, one per entry of `channel_axis`.
      group_size: channels that share a codebook, instead of all or one.
      channel_axis: the axis whose entries are channels.
      dim: entries along the last axis that are one codeword (product quantization): `bits / dim` bits per
        weight.
      stages: codebooks whose codewords add up (additive quantization): `stages * bits / dim` bits.
      start: of numbers: `"optimal"`, `"linear"`, `"density"` or `"kmeans++"`.
      importance: tree like `params` of non-negative numbers that broadcast against the leaves, such as
        `jp.scores.fisher`; a leaf's scalar counts as no importance. What is minimised is
        `sum(importance * (w - codeword)²)`.
      zero: keep the first codeword of each codebook at exactly 0, for weights that are 0; by default in
        leaves of which at least 1 % is. Needs `dim=1`.
      key: of random starts; by default a fixed one.
      where: which leaves; by default floating leaves with two axes or more.

    Returns:
      The tree with `ClusteredArray` leaves.

    Raises:
      ValueError: NaN or infinity, more clusters than a group has vectors, sizes that `dim` or
        `group_size` do not divide, importance that is negative or of another shape.

    Example:
      >>> tree = jp.cluster_tree({"w": jnp.linspace(0, 1, 4096).reshape(64, 64)}, bits=4)
      >>> tree["w"].nbytes, jnp.unique(tree["w"].materialize()).size
      (2112, 16)

    References: Han et al., "Deep Compression", 2015, https://arxiv.org/abs/1510.00149; Wang & Song,
    "Ckmeans.1d.dp", 2011 (optimal clusters on a line); Stock et al., "And the Bit Goes Down", 2019,
    https://arxiv.org/abs/1907.05686 (product quantization, weighted); Babenko & Lempitsky, 2014
    (additive)
    """
    how = _checked(
        bits, clusters, granularity, group_size, channel_axis, dim, stages, start, zero, key
    )
    paths, leaves, treedef = _trees.flatten(params)
    chosen = _trees.select(params, where)
    weights = _importances(importance, params, paths, leaves, chosen)
    for path, leaf, hit in zip(paths, leaves, chosen, strict=True):
        if hit:
            _check_fits(path, leaf.shape, how)
    out = list(leaves)
    todo = [i for i, hit in enumerate(chosen) if hit]
    silent = not Console().is_terminal
    for i in track(todo, "cluster", transient=True, disable=silent):
        out[i] = _clustered(paths[i], _trees.dense(leaves[i]), weights[i], how)
    return treedef.unflatten(out)


def materialize_tree(tree: PyTree) -> Params:
    """Dense arrays from compressed leaves of any kind, and ties resolved; other leaves stay.

    Args:
      tree: any tree.

    Returns:
      The tree with dense leaves.

    Example:
      >>> tree = jp.cluster_tree({"w": jnp.array([[0.0, 1.0], [1.0, 0.0]])}, bits=1)
      >>> jp.materialize_tree(tree)["w"].tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    return jax.tree.map(_trees.dense, _trees.resolve_ties(tree), is_leaf=is_compressed)


def _checked(
    bits: int,
    clusters: int | None,
    granularity: str,
    group_size: int | None,
    axis: int,
    dim: int,
    stages: int,
    start: str,
    zero: bool | None,
    key: jax.Array | None,
) -> _How:
    if clusters is None:
        if isinstance(bits, bool) or bits not in range(1, 9):
            raise ValueError(f"bits: expected 1 to 8, got {bits!r}")
        clusters = 2**bits
    else:
        _checks.positive_int("clusters", clusters, least=2)
        if clusters > 256:
            raise ValueError(f"clusters: expected 2 to 256, got {clusters}")
        bits = int(np.ceil(np.log2(clusters)))
    _checks.choice("granularity", granularity, ("tensor", "channel"))
    _checks.choice("start", start, _kmeans.STARTS)
    _checks.positive_int("dim", dim)
    _checks.positive_int("stages", stages)
    if group_size is not None:
        _checks.positive_int("group_size", group_size)
    size = 1 if granularity == "channel" and group_size is None else group_size
    if dim > 1 and zero:
        raise ValueError("zero: codewords that are vectors cannot hold pruned weights; use dim=1")
    if axis == -1 and size is not None and dim > 1:
        raise ValueError(
            "channel_axis: vectors lie along the last axis, so channels must lie along another one"
        )
    key = jax.random.key(0) if key is None else key
    return _How(clusters, bits, size, axis, dim, stages, start, zero, key)


def _importances(
    importance: Scores | None,
    params: Params,
    paths: list[str],
    leaves: list[Any],
    chosen: list[bool],
) -> list[Any]:
    if importance is None:
        return [None] * len(leaves)
    _checks.same_structure("importance", importance, "params", params)
    found = _trees.flatten(importance)[1]
    out: list[Any] = []
    for path, leaf, weight, hit in zip(paths, leaves, found, chosen, strict=True):
        if not hit or np.ndim(weight) == 0:
            out.append(None)
            continue
        _checks.broadcasts("importance", path, np.shape(weight), tuple(leaf.shape))
        weight = jnp.asarray(weight, jnp.float32)
        if not _checks.is_traced(weight):
            least, most = float(weight.min()), float(weight.max())
            if not (least >= 0 and np.isfinite(most)):
                raise ValueError(
                    f"importance: leaf {path!r} holds negative or non-finite numbers; give squares "
                    "or magnitudes"
                )
        out.append(jnp.broadcast_to(weight, leaf.shape))
    return out


def _check_fits(path: str, shape: tuple[int, ...], how: _How) -> None:
    if not shape:
        raise ValueError(f"params: leaf {path!r} is a scalar; leave it out with where=")
    if shape[-1] % how.dim:
        raise ValueError(
            f"dim: {how.dim} does not divide the last axis of leaf {path!r}, {shape}; choose a divisor "
            "or leave it out with where="
        )
    if how.group_size is None:
        return
    if not -len(shape) <= how.axis < len(shape) or shape[how.axis] % how.group_size:
        raise ValueError(
            f"group_size: {how.group_size} does not divide axis {how.axis} of leaf {path!r}, {shape}; "
            "choose a divisor or leave it out with where="
        )


def _clustered(path: str, x: Any, weight: Any, how: _How) -> ClusteredArray:
    x = jnp.asarray(x)
    if x.size == 0:
        raise ValueError(f"params: leaf {path!r} is empty; leave it out with where=")
    traced = _checks.is_traced(x) or _checks.is_traced(weight)
    zero = bool(how.zero) if how.dim == 1 else False
    wide = x.astype(jnp.float32)
    if not traced:
        host = np.asarray(wide)
        if not np.isfinite(host).all():
            raise ValueError(
                f"params: leaf {path!r} holds NaN or infinity and cannot be clustered; look for a "
                "diverged training step, or leave it out with where="
            )
        if how.zero is None and how.dim == 1 and how.stages == 1:
            zero = bool(np.count_nonzero(host) <= (1 - _PRUNED) * host.size)
        how = _enough(host, zero, how)
    plain = how.dim == 1 and how.stages == 1
    books, index = [], jnp.zeros(x.shape, jnp.uint8)
    parts = list(_groups(x.shape, how))
    if plain and not traced:
        numbers = np.zeros(x.shape, np.uint8)
        for part in parts:
            own = None if weight is None else np.asarray(weight)[part].ravel()
            book, numbers[part] = _on_line(host[part], own, zero, how)
            books.append(jnp.asarray(book))
        index = jnp.asarray(numbers)
    elif plain:
        for part in parts:
            own = None if weight is None else weight[part].ravel()
            book, found = _on_traced_line(wide[part].ravel(), own, zero, how)
            books.append(book)
            index = index.at[part].set(found.reshape(wide[part].shape))
    else:
        index = jnp.zeros((*x.shape[:-1], how.stages, x.shape[-1] // how.dim), jnp.uint8)
        for number, part in enumerate(parts):
            own = None if weight is None else weight[part].reshape(-1, how.dim)
            rows = wide[part].reshape(-1, how.dim)
            key = jax.random.fold_in(how.key, number)
            if rows.shape[0] < how.clusters:
                raise ValueError(
                    f"clusters: {how.clusters} are more than the {rows.shape[0]} vectors of a codebook "
                    f"of leaf {path!r}; use fewer bits, a smaller dim or larger groups"
                )
            book, found = _vectors.additive(rows, how.clusters, how.stages, key, weight=own)
            books.append(book)
            shape = (*wide[part].shape[:-1], x.shape[-1] // how.dim)
            found = jnp.moveaxis(found.reshape(how.stages, *shape), 0, -2)
            index = index.at[part].set(found.astype(jnp.uint8))
    book = _stacked(books, x.shape, how).astype(_book_dtype(x.dtype))
    book, copies = _copied(book, index, how)
    return ClusteredArray.of(
        book, index, bits=how.bits, dtype=x.dtype, dim=how.dim, zero=zero, copies=copies
    )


def _book_dtype(dtype: Any) -> Any:
    return jnp.float32 if dtype == jnp.float64 else dtype


def _groups(shape: tuple[int, ...], how: _How) -> Iterator[tuple[slice, ...]]:
    """The part of an array that each codebook serves."""
    if how.group_size is None:
        yield (slice(None),) * len(shape)
        return
    axis = how.axis % len(shape)
    for start in range(0, shape[axis], how.group_size):
        cut = slice(start, start + how.group_size)
        yield tuple(cut if i == axis else slice(None) for i in range(len(shape)))


def _stacked(books: list[Any], shape: tuple[int, ...], how: _How) -> jax.Array:
    """Codebooks with the axes of the array, of size 1 or as many as there are groups."""
    tail = books[0].shape
    axes = [1] * len(shape)
    if how.group_size is not None:
        axes[how.axis] = len(books)
    return jnp.stack(books).reshape(*axes, *tail)


def _copied(book: jax.Array, index: jax.Array, how: _How) -> tuple[jax.Array, int | None]:
    """Copies for each entry of the leading axis, where they cost next to nothing."""
    extra = 1 if how.dim == how.stages == 1 else 3
    rank = book.ndim - extra
    n = index.shape[0]
    bytes_of_indices = index.size * how.bits / 8
    if rank < 3 or book.shape[0] != 1 or n * book.nbytes * _CHEAP > bytes_of_indices:
        return book, None
    return jnp.repeat(book, n, axis=0), -rank


def _on_line(
    x: np.ndarray, weight: np.ndarray | None, zero: bool, how: _How
) -> tuple[np.ndarray, np.ndarray]:
    flat = x.ravel()
    seed = int(jax.random.randint(how.key, (), 0, 2**31 - 1)) if how.start == "kmeans++" else 0
    make = lambda x, w, k: _kmeans.kmeans(x, k, weight=w, start=how.start, seed=seed)
    if not zero:
        book, index = make(flat, weight, how.clusters)
        return book, index.reshape(x.shape)
    kept = flat != 0
    book, index = np.zeros(how.clusters, np.float32), np.zeros(flat.shape, np.uint8)
    if kept.any():
        some = None if weight is None else weight[kept]
        book[1:], found = make(flat[kept], some, how.clusters - 1)
        index[kept] = found + 1
    return book, index.reshape(x.shape)


def _on_traced_line(
    x: jax.Array, weight: jax.Array | None, zero: bool, how: _How
) -> tuple[jax.Array, jax.Array]:
    kept = x != 0
    weight = jnp.where(kept, 1.0 if weight is None else weight, 0.0) if zero else weight
    count = how.clusters - zero
    centers = _vectors.line_start(x, count)
    turn = lambda _, centers: _vectors.line_turn(x, centers, weight)
    centers = jax.lax.fori_loop(0, _TURNS, turn, centers)
    index = _vectors.assigned(x, centers)
    if not zero:
        return centers, index
    return jnp.concatenate([jnp.zeros(1), centers]), jnp.where(kept, index + 1, 0)


def _enough(x: np.ndarray, zero: bool, how: _How) -> _How:
    """No more clusters than there are values (or vectors), so that these are stored exactly; looks at all
    of them only where there are few.
    """
    sample = x.reshape(-1)[: 64 * how.clusters]
    if how.dim > 1:
        distinct = x.size // how.dim
    elif how.stages > 1 or len(np.unique(sample)) >= how.clusters:
        return how
    else:
        values = np.unique(x)
        distinct = len(values) + (zero and not (values == 0).any())
    count = min(how.clusters, max(distinct, 2))
    return replace(how, clusters=count, bits=max(int(np.ceil(np.log2(count))), 1))
