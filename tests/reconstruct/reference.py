"""GPTQ and SparseGPT as their papers write them: float64, one column after another."""

import numpy as np


def factor(gram, damping):
    gram = gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    return np.linalg.cholesky(np.linalg.inv(gram)).T


def gptq(w, gram, bits, group=None, damping=0.01, order="given"):
    """`w`: (features, outputs)."""
    w, n, top = w.astype(np.float64).T.copy(), len(gram), 2 ** (bits - 1) - 1
    size = group or n
    ranks = np.arange(n) if order == "given" else np.argsort(-np.diag(gram), kind="stable")
    scales = np.repeat(np.abs(w).reshape(len(w), -1, size).max(-1) / top, size, 1)[:, ranks]
    w, u = w[:, ranks], factor(gram[np.ix_(ranks, ranks)], damping)
    out = np.zeros_like(w)
    for j in range(n):
        if order == "given" and j % size == 0:
            scales[:, j : j + size] = np.abs(w[:, j : j + size]).max(1, keepdims=True) / top
        out[:, j] = np.clip(np.round(w[:, j] / scales[:, j]), -top, top) * scales[:, j]
        w[:, j:] -= np.outer((w[:, j] - out[:, j]) / u[j, j], u[j, j:])
    return out[:, np.argsort(ranks)].T


def sparsegpt(w, gram, sparsity, n=0, m=0, damping=0.01, block=128):
    """Pruned weights, and what is kept."""
    w, features = w.astype(np.float64).T.copy(), len(gram)
    u = factor(gram, damping)
    gone = np.zeros_like(w, bool)
    for start in range(0, features, block):
        stop = min(start + block, features)
        if not m:
            cost = (w[:, start:stop] / np.diag(u)[start:stop]) ** 2
            count = round(sparsity * cost.size)
            worst = np.argsort(cost, axis=None, kind="stable")[:count]
            rows, columns = np.unravel_index(worst, cost.shape)
            gone[rows, start + columns] = True
        for j in range(start, stop):
            if m and j % m == 0:
                cost = (w[:, j : j + m] / np.diag(u)[j : j + m]) ** 2
                least = np.argsort(cost, 1, kind="stable")[:, : m - n]
                np.put_along_axis(gone[:, j : j + m], least, True, 1)
            kept = np.where(gone[:, j], 0.0, w[:, j])
            lost = (w[:, j] - kept) / u[j, j]
            w[:, j:] -= np.outer(lost, u[j, j:])
            w[:, j] = kept
    return w.T, ~gone.T


def loss(w, made, gram):
    """Squared error of outputs, relative to the outputs' size."""
    w = np.asarray(w, np.float64)
    d = np.asarray(made, np.float64) - w
    return np.trace(d.T @ gram @ d) / np.trace(w.T @ gram @ w)
