"""Low-rank approximations of arrays, in NumPy."""

import numpy as np

_ROUNDS = 3  # of HOOI
_ALS = 60


def root_and_inverse(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square root of a second moment, and its inverse; directions that hold nothing count a
    little.
    """
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    values = np.maximum(values, 1e-6 * max(values.max(initial=0.0), 1e-30))
    root = np.sqrt(values)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def singular_values(x: np.ndarray) -> np.ndarray:
    """Of matrices (…, m, n), descending."""
    return np.linalg.svd(x, compute_uv=False)


def low_rank(x: np.ndarray, rank: int, metric: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Factors (m, rank) and (rank, n) of a matrix, the nearest; in the metric of a second moment (m,
    m) of what multiplies it.
    """
    wide = x.astype(np.float64)
    if metric is None:
        u, s, v = np.linalg.svd(x, full_matrices=False)
        root = np.sqrt(s[:rank])
        return (u[:, :rank] * root).astype(x.dtype), (root[:, None] * v[:rank]).astype(x.dtype)
    forth, back = root_and_inverse(metric)
    u, s, v = np.linalg.svd(forth @ wide, full_matrices=False)
    root = np.sqrt(s[:rank])
    left, right = back @ (u[:, :rank] * root), root[:, None] * v[:rank]
    return left.astype(x.dtype), right.astype(x.dtype)


def tucker(kernel: np.ndarray, ranks: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tucker-2: factors of the last two axes and a core, by higher-order orthogonal iteration.

    Returns (in, a), (space…, a, b) and (b, out).
    """
    *space, n_in, n_out = kernel.shape
    t = kernel.reshape(-1, n_in, n_out).astype(np.float64)
    basis = lambda matrix, rank: np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    a = basis(t.transpose(1, 0, 2).reshape(n_in, -1), ranks[0])
    b = basis(t.transpose(2, 0, 1).reshape(n_out, -1), ranks[1])
    for _ in range(_ROUNDS):
        a = basis(np.einsum("sio,ob->isb", t, b).reshape(n_in, -1), ranks[0])
        b = basis(np.einsum("sio,ia->osa", t, a).reshape(n_out, -1), ranks[1])
    core = np.einsum("sio,ia,ob->sab", t, a, b).reshape(*space, *ranks)
    return a.astype(kernel.dtype), core.astype(kernel.dtype), b.T.astype(kernel.dtype)


def canonical(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CP of (space, in, out) by alternating least squares, slightly damped, from a start by SVD.

    Returns (in, rank), (space…, 1, rank) and (rank, out).
    """
    *space, n_in, n_out = kernel.shape
    t = kernel.reshape(-1, n_in, n_out).astype(np.float64)
    rng = np.random.default_rng(0)

    def start(axis: int) -> np.ndarray:
        matrix = np.moveaxis(t, axis, 0).reshape(t.shape[axis], -1)
        u = np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
        more = rng.standard_normal((t.shape[axis], rank - u.shape[1]))
        return np.concatenate([u, more / max(t.shape[axis], 1) ** 0.5], 1)

    s, i, o = (start(axis) for axis in range(3))

    def solve(target: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        gram = (one.T @ one) * (other.T @ other)
        damped = gram + 1e-9 * np.trace(gram) / rank * np.eye(rank)
        return np.linalg.solve(damped, target.T).T

    for _ in range(_ALS):
        s = solve(np.einsum("sio,ir,or->sr", t, i, o, optimize=True), i, o)
        i = solve(np.einsum("sio,sr,or->ir", t, s, o, optimize=True), s, o)
        o = solve(np.einsum("sio,sr,ir->or", t, s, i, optimize=True), s, i)
        sizes = [np.maximum(np.linalg.norm(y, axis=0), 1e-30) for y in (s, i, o)]
        even = np.cbrt(sizes[0] * sizes[1] * sizes[2])
        s, i, o = (y / n * even for y, n in zip((s, i, o), sizes, strict=True))
    core = s.reshape(*space, 1, rank)
    return i.astype(kernel.dtype), core.astype(kernel.dtype), o.T.astype(kernel.dtype)
