"""Whole trees to products of smaller arrays."""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxprune import _checks, _trees
from jaxprune._progress import track
from jaxprune._types import Params, PyTree, Where
from jaxprune._uses import Uses
from jaxprune.share import _decompose
from jaxprune.share._low_rank import LowRankArray, TuckerArray

METHODS = ("svd", "tucker", "cp")


class _Leaf(NamedTuple):
    """One leaf as matrices (batch, head, tail).

    Attributes: batch, tail: numbers of axes; x: (batch, m, n); metric: (batch, m, m), or `None`;
      of_tail: the metric is that of the tail, and matrices are transposed.
    """

    path: str
    shape: tuple[int, ...]
    batch: int
    tail: int
    x: np.ndarray
    metric: np.ndarray | None
    of_tail: bool
    values: np.ndarray  # singular values, (batch, k)

    @property
    def cost(self) -> int:
        """Parameters per rank, of one matrix."""
        return self.x.shape[1] + self.x.shape[2]

    @property
    def most(self) -> int:
        """The largest rank that saves parameters."""
        m, n = self.x.shape[1:]
        return min((m * n - 1) // (m + n), min(m, n)) if m * n else 0


def factorize_tree(
    params: Params,
    *,
    rank: int | float | None = None,
    energy: float | None = None,
    budget: float | None = None,
    method: str = "svd",
    stats: PyTree | None = None,
    batch: int | None = None,
    tail: int | None = None,
    uses: Any = None,
    where: Where = None,
) -> PyTree:
    """Factorize weights (low rank, Tucker, CP), where that saves parameters.

    `svd` cuts the singular values of each matrix (m, n): `LowRankArray`s of (m, rank) and (rank, n).
    Stacks of matrices (three axes) are cut layer by layer; convolution kernels (four axes and more) as
    matrices (space and in, out). `tucker` and `cp` cut the channels of kernels: `TuckerArray`s.

    Args:
      params: any tree of arrays.
      rank: of each leaf, a number, or a fraction in (0, 1) of its full rank. Exactly one of `rank`,
        `energy` and `budget` is given.
      energy: fraction in (0, 1] of the squared singular values that each leaf keeps.
      budget: fraction in (0, 1) of the selected leaves' parameters that remains in all; ranks are chosen
        where they keep most of a leaf's energy per parameter. Only with `svd`.
      method: `"svd"`, `"tucker"` or `"cp"`.
      stats: of `jp.calibrate`, on the same tree: what is kept is the outputs on that data, not the
        weights (with `second_moment=True` exactly, else feature by feature). Only with `svd`.
      batch: leading axes that hold stacked matrices; by default the stacked ones that `uses` names,
        without it 1 of leaves with three axes, else 0.
      tail: trailing axes of the second factor; by default the free (or, where matrices are transposed
        before use, contracted) ones that `uses` names, without it 1.
      uses: of `jp.uses(fn, params, *args)`, or statistics that carry them: by default `stats`.
      where: which leaves; by default the weights.

    Returns:
      The tree with `LowRankArray` or `TuckerArray` leaves.

    Raises:
      ValueError: not one target, a rank above that of every leaf, NaN or infinity, axes that do not
        fit, traced parameters.

    Warns:
      UserWarning: leaves that stay dense, since factors of the wanted rank would be no smaller.

    Example:
      >>> x = jnp.outer(jnp.arange(8.0), jnp.ones(8)) + jnp.eye(8) * 1e-3
      >>> tree = jp.factorize_tree({"w": x}, energy=0.99)
      >>> tree["w"].rank, tree["w"].nbytes
      (1, 64)

    References: Denton et al., 2014, https://arxiv.org/abs/1404.0736; Kim et al., 2015 (Tucker),
    https://arxiv.org/abs/1511.06530; Lebedev et al., 2014 (CP), https://arxiv.org/abs/1412.6553;
    Wang et al., SVD-LLM, 2024, https://arxiv.org/abs/2403.07378 (data-aware)
    """
    _check_targets(rank, energy, budget, method, stats)
    paths, leaves, treedef = _trees.flatten(params)
    uses = stats if uses is None else uses
    chosen = _trees.select(params, where, uses=uses)
    known = _trees.uses_of(params, uses)
    _trees.tell_contradictions(paths, known, chosen)
    found_stats = [None] * len(leaves) if stats is None else treedef.flatten_up_to(stats)
    out, dense = list(leaves), []
    ready: dict[int, _Leaf] = {}
    for i in track(range(len(leaves)), "factorize"):
        if not chosen[i]:
            continue
        host = _host(paths[i], leaves[i])
        if method == "svd":
            parts = _parts(paths[i], host.shape, known[i], uses is not None, batch, tail)
            ready[i] = _as_matrices(paths[i], host, found_stats[i], *parts)
        elif host.ndim < 3:
            raise ValueError(
                f"method: {method!r} factorises convolution kernels, and leaf {paths[i]!r} has shape "
                f"{host.shape}; select kernels with where="
            )
        else:
            out[i] = _kernel(paths[i], host, rank, energy, method, leaves[i].dtype)
            if out[i] is None:
                out[i] = leaves[i]
                dense.append(paths[i])
    ranks = _ranks(ready, rank, energy, budget)
    for i, leaf in track(ready.items(), "factorize"):
        if 0 < ranks[i] <= leaf.most:
            out[i] = _factored(leaf, ranks[i], leaves[i].dtype)
        else:
            dense.append(paths[i])
    if dense:
        warnings.warn(
            f"factorize_tree: {len(dense)} leaves stay dense, since factors of the wanted rank would be "
            f"no smaller: {', '.join(dense[:5])}{', …' if len(dense) > 5 else ''}",
            stacklevel=2,
        )
    return treedef.unflatten(out)


def ranks_table(params: Params, factorized: PyTree) -> Table:
    """Ranks, parameters and error of each factorised leaf.

    Args:
      params: the dense tree.
      factorized: of `jp.factorize_tree`.

    Returns:
      A `rich` table.

    Example:
      >>> params = {"w": jnp.ones((8, 8))}
      >>> jp.share.ranks_table(params, jp.factorize_tree(params, rank=1)).row_count
      1
    """
    factorized = _checks.aligned("factorized", factorized, "params", params)
    table = Table(title="Factors")
    for column in ("leaf", "shape", "rank", "parameters", "relative error"):
        table.add_column(column, overflow="fold")
    paths, leaves, treedef = _trees.flatten(params)
    for path, leaf, now in zip(paths, leaves, treedef.flatten_up_to(factorized), strict=True):
        if not isinstance(now, LowRankArray | TuckerArray):
            continue
        was = jnp.asarray(_trees.dense(leaf), jnp.float32)
        error = jnp.linalg.norm((was - now.materialize()).ravel()) / jnp.linalg.norm(was.ravel())
        rank = now.rank if isinstance(now, LowRankArray) else now.core.shape[-2:]
        kept = now.nbytes / max(leaf.size * leaf.dtype.itemsize, 1)
        table.add_row(
            path, "×".join(map(str, leaf.shape)), str(rank), f"{kept:.1%}", f"{error:.4f}"
        )
    return table


def _check_targets(rank: Any, energy: Any, budget: Any, method: str, stats: Any) -> None:
    _checks.choice("method", method, METHODS)
    given = [
        n for n, v in (("rank", rank), ("energy", energy), ("budget", budget)) if v is not None
    ]
    if len(given) != 1:
        raise ValueError(f"rank, energy, budget: expected exactly one, got {given or 'none'}")
    if isinstance(rank, float):
        if not 0 < rank < 1:
            raise ValueError(f"rank: expected a whole number, or a fraction in (0, 1), got {rank}")
    elif rank is not None:
        _checks.positive_int("rank", rank)
    for name, value in (("energy", energy), ("budget", budget)):
        if value is not None:
            _checks.fraction(name, value)
            if not value:
                raise ValueError(f"{name}: expected a fraction above 0, got {value}")
    if method != "svd" and (budget is not None or stats is not None):
        raise ValueError(f"method: {method!r} takes neither budget nor stats; use 'svd'")


def _host(path: str, leaf: Any) -> np.ndarray:
    x = _trees.dense(leaf)
    if _checks.is_traced(x):
        raise ValueError(
            f"params: leaf {path!r} is traced; ranks are shapes, so factorise outside of jit"
        )
    host = np.asarray(x, np.float32)
    if not np.isfinite(host).all():
        raise ValueError(
            f"params: leaf {path!r} holds NaN or infinity; look for a diverged training step, or leave "
            "it out with where="
        )
    return host


def _parts(
    path: str, shape: tuple[int, ...], use: Uses, is_read: bool, batch: int | None, tail: int | None
) -> tuple[int, int]:
    """How many leading axes stack matrices, and how many trailing ones the second factor has."""
    n = len(shape)
    stacked, outer = [axis + n for axis in use.stacked], [axis + n for axis in use.free]
    if is_read and batch is None and stacked != list(range(len(stacked))):
        raise ValueError(
            f"uses: leaf {path!r} of shape {shape} stacks matrices along axes {stacked}, which are not "
            "the leading ones; leave it out with where="
        )
    lead = len(stacked) if is_read else (1 if n == 3 and len(outer) == 1 else 0)
    lead = lead if batch is None else batch
    last = len(outer) if outer and outer == list(range(n - len(outer), n)) else 1
    if is_read and outer == list(range(lead, lead + len(outer))) and lead + len(outer) < n:
        last = n - lead - len(outer)  # (out, in): the contracted axes are the trailing ones
    last = last if tail is None else tail
    if lead < 0 or last < 1 or lead + last >= n:
        raise ValueError(
            f"batch, tail: {lead} and {last} leave no axis to the first factor of leaf {path!r}, shape "
            f"{shape}; give others, or leave it out with where="
        )
    return lead, last


def _as_matrices(path: str, x: np.ndarray, stat: Any, lead: int, last: int) -> _Leaf:
    count = int(np.prod(x.shape[:lead]))
    m, n = int(np.prod(x.shape[lead : x.ndim - last])), int(np.prod(x.shape[x.ndim - last :]))
    flat = x.reshape(count, m, n)
    metric, of_tail = _metric(path, x.shape, stat, lead, last)
    if of_tail:
        flat = flat.transpose(0, 2, 1)
    seen = (
        flat
        if metric is None
        else np.stack(
            [_decompose.root_and_inverse(s)[0] @ y for s, y in zip(metric, flat, strict=True)]
        )
    )
    return _Leaf(path, x.shape, lead, last, flat, metric, of_tail, _decompose.singular_values(seen))


def _metric(
    path: str, shape: tuple[int, ...], stat: Any, batch: int, tail: int
) -> tuple[np.ndarray | None, bool]:
    """Second moments (batch, features, features) of the summed side, and whether that is the tail."""
    if stat is None or not np.any(np.asarray(stat.count)):
        return None, False
    rank = len(shape)
    summed = sorted(axis % rank for axis in stat.axes)
    head_axes, tail_axes = list(range(batch, rank - tail)), list(range(rank - tail, rank))
    if summed not in (head_axes, tail_axes):
        raise ValueError(
            f"stats: leaf {path!r} sums over axes {summed}, which are neither head {head_axes} nor tail "
            f"{tail_axes}; give batch= and tail= that part them"
        )
    features = int(np.prod([shape[i] for i in summed]))
    count = int(np.prod(shape[:batch]))
    if stat.second_moment is not None:
        found = np.asarray(stat.second_moment, np.float64).reshape(-1, features, features)
    else:
        squares = np.asarray(stat.mean_square, np.float64).reshape(-1, features)
        found = np.stack([np.diag(row) for row in squares])
    if stat.groups > 1:  # one matrix of all groups: what they read on average
        found = found.reshape(-1, stat.groups, features, features).mean(1)
    return np.broadcast_to(found, (count, features, features)), summed == tail_axes


def _ranks(
    leaves: dict[int, _Leaf], rank: Any, energy: float | None, budget: float | None
) -> dict[int, int]:
    if budget is not None:
        return _ranks_within(leaves, budget)
    found = {}
    for i, leaf in leaves.items():
        full = leaf.values.shape[-1]
        if energy is not None:
            squares = np.cumsum(np.square(leaf.values, dtype=np.float64), -1)
            kept = squares / np.maximum(squares[:, -1:], 1e-300)
            found[i] = int((kept < energy - 1e-12).sum(-1).max(initial=0)) + 1
        elif isinstance(rank, float):
            found[i] = max(round(rank * full), 1)
        else:
            found[i] = rank
    fulls = {leaf.path: leaf.values.shape[-1] for leaf in leaves.values()}
    if isinstance(rank, int) and fulls and rank > max(fulls.values()):
        path = max(fulls, key=lambda p: fulls[p])
        raise ValueError(
            f"rank: {rank} is more than the full rank of every leaf ({fulls[path]} of {path!r} is the "
            "highest); give a smaller one"
        )
    return found


def _ranks_within(leaves: dict[int, _Leaf], budget: float) -> dict[int, int]:
    """Ranks one by one, where they keep most of a leaf's energy per parameter, until all is spent."""
    total = sum(leaf.x.size for leaf in leaves.values())
    gains, owners, costs = [], [], []
    spent = 0.0
    for i, leaf in leaves.items():
        squares = np.square(leaf.values, dtype=np.float64).sum(0)
        share = squares / max(squares.sum(), 1e-300)
        cost = leaf.cost * leaf.x.shape[0]
        spent += cost  # at least rank 1
        gains.append(share[1:] / cost * leaf.x.size)
        owners.append(np.full(len(share) - 1, i))
        costs.append(np.full(len(share) - 1, cost))
    if spent > budget * total:
        raise ValueError(
            f"budget: {budget} is less than rank 1 of every leaf takes ({spent / total:.3f}); "
            "give more, or select fewer leaves with where="
        )
    order = np.argsort(-np.concatenate(gains), kind="stable") if gains else np.zeros(0, int)
    owner, cost = np.concatenate(owners)[order], np.concatenate(costs)[order]
    ranks = dict.fromkeys(leaves, 1)
    full: set[int] = set()
    for i, price in zip(owner.tolist(), cost.tolist(), strict=True):
        if i in full:
            continue
        leaf = leaves[i]
        if ranks[i] >= leaf.most:  # from here on dense is cheaper, and exact
            whole = leaf.x.size - ranks[i] * price
            if spent + whole <= budget * total:
                spent += whole
                ranks[i] = leaf.most + 1
            full.add(i)
        elif spent + price <= budget * total:
            ranks[i] += 1
            spent += price
    return ranks


def _factored(leaf: _Leaf, rank: int, dtype: Any) -> LowRankArray:
    pairs = [
        _decompose.low_rank(x, rank, None if leaf.metric is None else leaf.metric[k])
        for k, x in enumerate(leaf.x)
    ]
    left, right = (np.stack(parts) for parts in zip(*pairs, strict=True))
    if leaf.of_tail:
        left, right = right.transpose(0, 2, 1), left.transpose(0, 2, 1)
    lead = leaf.shape[: leaf.batch]
    head = leaf.shape[leaf.batch : len(leaf.shape) - leaf.tail]
    tail = leaf.shape[len(leaf.shape) - leaf.tail :]
    return LowRankArray(
        jnp.asarray(left.reshape(*lead, *head, rank), dtype),
        jnp.asarray(right.reshape(*lead, rank, *tail), dtype),
        leaf.tail,
        np.dtype(dtype),
    )


def _kernel(
    path: str, x: np.ndarray, rank: Any, energy: float | None, method: str, dtype: Any
) -> TuckerArray | None:
    n_in, n_out = x.shape[-2:]
    t = x.reshape(-1, n_in, n_out)
    unfolded = (t.transpose(1, 0, 2).reshape(n_in, -1), t.transpose(2, 0, 1).reshape(n_out, -1))
    fulls = [min(matrix.shape) for matrix in unfolded]

    def wanted(matrix: np.ndarray, full: int) -> int:
        if energy is not None:
            squares = np.cumsum(np.square(_decompose.singular_values(matrix), dtype=np.float64))
            return int((squares / max(squares[-1], 1e-300) < energy - 1e-12).sum()) + 1
        return max(round(rank * full), 1) if isinstance(rank, float) else rank

    ranks = [wanted(matrix, full) for matrix, full in zip(unfolded, fulls, strict=True)]
    if method == "cp":
        ranks = [max(ranks)] * 2
        if ranks[0] > t.size // max(t.shape):
            raise ValueError(f"rank: {ranks[0]} is out of range for leaf {path!r}, shape {x.shape}")
    elif any(r > full for r, full in zip(ranks, fulls, strict=True)):
        raise ValueError(
            f"rank: {max(ranks)} is more than the full ranks {tuple(fulls)} of the channels of leaf "
            f"{path!r}, shape {x.shape}; give a smaller one or leave it out with where="
        )
    a, b = ranks
    core = t.shape[0] * (a if method == "cp" else a * b)
    if n_in * a + core + b * n_out >= x.size:
        return None
    parts = _decompose.canonical(x, a) if method == "cp" else _decompose.tucker(x, (a, b))
    return TuckerArray(*(jnp.asarray(part, dtype) for part in parts), np.dtype(dtype))
