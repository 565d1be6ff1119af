"""Whole trees to clustered leaves and back."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._progress import track
from jaxprune._types import Params, PyTree, Scores, Where, is_compressed
from jaxprune._uses import Uses
from jaxprune.share import _kmeans, _vectors
from jaxprune.share._clustered import ClusteredArray

_PRUNED = 0.01  # exact zeros from which on a leaf counts as pruned
_CHEAP = 50  # how much smaller than the indices copies of a codebook must be
_TURNS = 30


@dataclass(frozen=True)
class _How:
    """What is asked for, and of one leaf (`on`) along which axes codebooks differ."""

    clusters: int
    bits: int
    group_size: int | None
    axis: int | None
    dim: int
    stages: int
    start: str
    zero: bool | None
    key: jax.Array
    extents: tuple[tuple[int, int], ...] = ()  # (axis, entries that share a codebook)

    def on(self, path: str, shape: tuple[int, ...], use: Uses) -> "_How":
        """The same for one leaf: every layer of a stack has codebooks of its own, or a size fails."""
        if not shape:
            raise ValueError(f"params: leaf {path!r} is a scalar; leave it out with where=")
        if shape[-1] % self.dim:
            raise ValueError(
                f"vector_size: {self.dim} does not divide the last axis of leaf {path!r}, {shape}; "
                "choose a divisor or leave it out with where="
            )
        extents = dict.fromkeys(use.stacked, 1)
        if self.group_size is not None:
            own = [a for a in (use.free or (-1,)) if a not in extents][-1:] or [-1]
            axis = own[0] if self.axis is None else self.axis
            if not -len(shape) <= axis < 0 or shape[axis] % self.group_size:
                raise ValueError(
                    f"group_size: {self.group_size} does not divide axis {axis} of leaf {path!r}, "
                    f"{shape}; choose a divisor or leave it out with where="
                )
            if axis == -1 and self.dim > 1:
                raise ValueError(
                    f"channel_axis: vectors lie along the last axis of leaf {path!r}, so channels must "
                    "lie along another one"
                )
            extents[axis] = self.group_size
        return replace(self, extents=tuple(sorted(extents.items())))


def cluster_tree(
    params: Params,
    bits: int | None = None,
    *,
    clusters: int | None = None,
    granularity: str = "tensor",
    group_size: int | None = None,
    channel_axis: int | None = None,
    vector_size: int = 1,
    codebooks: int = 1,
    init: str = "optimal",
    importance: Scores | None = None,
    preserve_zeros: bool | None = None,
    key: jax.Array | None = None,
    uses: Any = None,
    where: Where = None,
) -> PyTree:
    """Cluster weights (k-means weight sharing): `ClusteredArray` leaves of few distinct values.

    Numbers are clustered by near-exact one-dimensional k-means (dynamic programming over bins, then
    Lloyd's iteration over their sums), vectors by k-means++ and Lloyd's.

    Args:
      params: any tree of arrays; compressed leaves count as what they stand for.
      bits: of an index, 1 to 8; 4 by default.
      clusters: values per codebook, 2 to 256, instead of `bits`. A leaf with fewer distinct values is
        stored exactly, with as few.
      granularity: `"tensor"`, one codebook per leaf, or `"channel"`, one per entry of `channel_axis`.
      group_size: channels that share a codebook, instead of all or one.
      channel_axis: the axis whose entries are channels, counted from the end; by default the innermost
        free one, without `uses` the last.
      vector_size: entries along the last axis that are one codeword (product quantization):
        `bits / vector_size` bits per weight.
      codebooks: how many, whose codewords add up (additive quantization): `codebooks` times the bits.
      init: of numbers: `"optimal"`, `"linear"`, `"density"` or `"kmeans++"`.
      importance: tree like `params` of non-negative numbers that broadcast against the leaves, such as
        `jp.scores.fisher`; a leaf's scalar counts as no importance. What is minimised is
        `sum(importance * (w - codeword)²)`.
      preserve_zeros: keep the first codeword of each codebook at exactly 0, for weights that are 0; by
        default in leaves of which at least 1 % is. Needs `vector_size=1`.
      key: of random starts; by default a fixed one.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes stack layers: each
        layer has codebooks of its own.
      where: which leaves; by default the weights.

    Returns:
      The tree with `ClusteredArray` leaves.

    Raises:
      ValueError: NaN or infinity, more clusters than a group has vectors, sizes that `vector_size` or
        `group_size` do not divide, arguments that contradict each other, importance that is negative or
        of another shape.

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
        bits, clusters, granularity, group_size, channel_axis, vector_size, codebooks, init,
        preserve_zeros, key,
    )  # fmt: skip
    paths, leaves, treedef = _trees.flatten(params)
    chosen = _trees.select(params, where, uses=uses)
    weights = _importances(importance, params, paths, leaves, chosen)
    roles = _stacks(paths, leaves) if uses is None else _trees.uses_of(params, uses)
    _trees.tell_contradictions(paths, roles, chosen)
    ways = {
        i: how.on(path, tuple(leaf.shape), use)
        for i, (path, leaf, hit, use) in enumerate(zip(paths, leaves, chosen, roles, strict=True))
        if hit
    }
    out = list(leaves)
    for i, own in track(ways.items(), "cluster"):
        out[i] = _clustered(paths[i], _trees.dense(leaves[i]), weights[i], own)
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
    bits: int | None,
    clusters: int | None,
    granularity: str,
    group_size: int | None,
    axis: int | None,
    dim: int,
    stages: int,
    start: str,
    zero: bool | None,
    key: jax.Array | None,
) -> _How:
    if clusters is None:
        bits = 4 if bits is None else bits
        if isinstance(bits, bool) or bits not in range(1, 9):
            raise ValueError(f"bits: expected 1 to 8, got {bits!r}")
        clusters = 2**bits
    else:
        if bits is not None:
            raise ValueError(
                f"bits, clusters: {clusters} clusters have bits of their own; give one"
            )
        _checks.positive_int("clusters", clusters, least=2)
        if clusters > 256:
            raise ValueError(f"clusters: expected 2 to 256, got {clusters}")
        bits = int(np.ceil(np.log2(clusters)))
    _checks.choice("granularity", granularity, ("tensor", "channel"))
    _checks.choice("init", start, _kmeans.STARTS)
    _checks.positive_int("vector_size", dim)
    _checks.positive_int("codebooks", stages)
    if group_size is not None:
        _checks.positive_int("group_size", group_size)
    size = 1 if granularity == "channel" and group_size is None else group_size
    if axis is not None and size is None:
        raise ValueError(
            "channel_axis: one codebook serves all channels; give granularity or group_size"
        )
    if dim > 1 and zero:
        raise ValueError(
            "preserve_zeros: codewords that are vectors cannot hold pruned weights; use vector_size=1"
        )
    key = jax.random.key(0) if key is None else key
    return _How(clusters, bits, size, axis, dim, stages, start, zero, key)


def _stacks(paths: list[str], leaves: list[Any]) -> list[Uses]:
    """Roles by convention: what may be a stack has a codebook per layer, kernels of windows have not."""
    pairs = zip(leaves, _trees.conventions_of(paths, leaves), strict=True)
    return [
        Uses("product")
        if known.is_sure and _trees.rank(leaf) > 3
        else Uses("product", known.uses.stacked if _trees.rank(leaf) > 2 else ())
        for leaf, known in pairs
    ]


def _importances(
    importance: Scores | None,
    params: Params,
    paths: list[str],
    leaves: list[Any],
    chosen: list[bool],
) -> list[Any]:
    if importance is None:
        return [None] * len(leaves)
    importance = _checks.aligned("importance", importance, "params", params)
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
    extents = {axis % len(shape): size for axis, size in how.extents}
    ranges = [range(0, n, max(extents.get(i, n), 1)) for i, n in enumerate(shape)]
    for starts in itertools.product(*ranges):
        yield tuple(
            slice(start, start + extents.get(i, n))
            for i, (start, n) in enumerate(zip(starts, shape, strict=True))
        )


def _stacked(books: list[Any], shape: tuple[int, ...], how: _How) -> jax.Array:
    """Codebooks with the axes of the array, of size 1 or as many as there are groups."""
    axes = [1] * len(shape)
    for axis, size in how.extents:
        axes[axis] = shape[axis] // size
    return jnp.stack(books).reshape(*axes, *books[0].shape)


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
