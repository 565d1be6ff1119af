"""k-means on a line against exhaustive optima, and of vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.share import _kmeans, _vectors


def optimum(x, k, weight=None):
    """The least inertia of k clusters on a line, by dynamic programming over all points."""
    order = np.argsort(x)
    x = x[order].astype(np.float64)
    w = np.ones(len(x)) if weight is None else weight[order].astype(np.float64)

    def cost(i, j):
        total = w[i:j].sum()
        if total == 0:
            return 0.0
        mean = (w[i:j] * x[i:j]).sum() / total
        return (w[i:j] * (x[i:j] - mean) ** 2).sum()

    best = np.full((k + 1, len(x) + 1), np.inf)
    best[0, 0] = 0
    for c in range(1, k + 1):
        for j in range(1, len(x) + 1):
            best[c, j] = min(best[c - 1, i] + cost(i, j) for i in range(j))
    return best[1:, -1].min()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_inertia_is_the_optimum(k, weighted):
    rng = np.random.default_rng(k)
    x = np.concatenate([rng.normal(size=40), rng.normal(size=20) * 0.1 + 5]).astype(np.float32)
    weight = rng.random(60).astype(np.float32) if weighted else None
    centers, index = _kmeans.kmeans(x, k, weight=weight)
    found = _kmeans.inertia(x, centers, index, weight)
    assert found <= 1.0001 * optimum(x, k, weight) + 1e-6


def test_large_arrays_come_near_the_known_optimum_of_a_normal_distribution():
    x = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    for k, wanted in ((2, 0.3634), (4, 0.1175), (16, 0.009497)):  # Max, 1960
        centers, index = _kmeans.kmeans(x, k)
        assert _kmeans.inertia(x, centers, index) / len(x) < 1.01 * wanted * x.var()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300),
    st.integers(1, 40),
    st.sampled_from(_kmeans.STARTS),
)
def test_every_point_has_its_nearest_center(values, k, start):
    x = np.array(values, np.float32)
    centers, index = _kmeans.kmeans(x, k, start=start)
    assert centers.shape == (k,)
    assert (np.diff(centers) >= 0).all()
    distance = np.abs(x[:, None].astype(np.float64) - centers)
    np.testing.assert_allclose(
        distance[np.arange(len(x)), index], distance.min(1), rtol=1e-5, atol=1e-6 * np.abs(x).max()
    )


def test_outliers_do_not_coarsen_the_rest():
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    far = np.concatenate([x, np.float32([1e6])])
    centers, index = _kmeans.kmeans(far, 17)
    assert _kmeans.inertia(far, centers, index) < 1.02 * len(x) * 0.009497


def test_vectors_are_clustered_as_scipy_does():
    from scipy.cluster.vq import kmeans2

    rng = np.random.default_rng(0)
    means = rng.normal(size=(8, 3)) * 5
    x = (means[rng.integers(0, 8, 2000)] + rng.normal(size=(2000, 3))).astype(np.float32)
    centers, index = _vectors.kmeans(jnp.asarray(x), 8, jax.random.key(0))
    ours = float(np.square(x - np.asarray(centers)[np.asarray(index)]).sum())
    theirs = min(
        np.square(x - c[i]).sum()
        for c, i in (kmeans2(x, 8, minit="++", rng=seed) for seed in range(3))
    )
    assert ours < 1.1 * theirs
    _, distance = _vectors.nearest(jnp.asarray(x), centers, None)
    np.testing.assert_allclose(distance.sum(), ours, rtol=1e-3)


def test_weights_move_centers_of_vectors():
    x = jnp.array([[0.0, 0.0], [1.0, 1.0]])
    weight = jnp.array([[1.0, 3.0], [3.0, 1.0]])
    centers, _ = _vectors.kmeans(x, 1, jax.random.key(0), weight=weight)
    np.testing.assert_allclose(centers, [[0.75, 0.25]], rtol=1e-5)


def test_stages_add_up():
    x = jax.random.normal(jax.random.key(0), (4000, 4))
    errors = []
    for stages in (1, 2, 3):
        books, index = _vectors.additive(x, 16, stages, jax.random.key(1))
        found = sum(books[m][index[m]] for m in range(stages))
        errors.append(float(jnp.mean((x - found) ** 2)))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
