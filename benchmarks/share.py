"""Clustering 4 M weights into 16 values beside scikit-learn, and what sharing costs elsewhere.

    python benchmarks/share.py      # scikit-learn is compared where it is installed

Ratios within one run; inertia relative to scikit-learn's best of 3 starts.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from _timing import in_turns, show

import jaxprune as jp
from jaxprune.export import _entropy
from jaxprune.share import _kmeans

WEIGHTS, CLUSTERS = 4_000_000, 16


def with_scikit_learn(x):
    """Seconds and inertia of one KMeans run from each of 3 seeds."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        return None
    found = []
    for seed in range(3):
        start = time.perf_counter()
        model = KMeans(CLUSTERS, n_init=1, random_state=seed).fit(x[:, None])
        found.append((time.perf_counter() - start, model.inertia_))
    return min(s for s, _ in found), min(i for _, i in found)


def main():
    x = np.random.default_rng(0).normal(size=WEIGHTS).astype(np.float32)
    centers, index = _kmeans.kmeans(x, CLUSTERS)
    inertia = _kmeans.inertia(x, centers, index)
    params = {"w": jnp.asarray(x.reshape(2000, 2000))}
    double = jax.jit(lambda w: w * 2.0)
    calls = {
        "read and write float32": lambda: double(params["w"]),
        "np.sort": lambda: np.sort(x),
        "k-means into 16": lambda: _kmeans.kmeans(x, CLUSTERS),
        "cluster_tree, packed": lambda: jp.cluster_tree(params, bits=4)["w"].indices,
        "k-means into 256": lambda: _kmeans.kmeans(x, 256),
        "entropy coding of its indices": lambda: _entropy.encode(index),
    }
    seconds = in_turns(calls, rounds=5)
    show(f"{WEIGHTS:,} weights", seconds, "np.sort")
    print(
        f"inertia per weight: {inertia / WEIGHTS:.6f} (optimum of a normal distribution: 0.009497)"
    )
    theirs = with_scikit_learn(x)
    if theirs is not None:
        print(
            f"scikit-learn KMeans, one start: {theirs[0] / seconds['cluster_tree, packed']:.1f} times "
            f"the time of cluster_tree; our inertia is {inertia / theirs[1]:.4f} of its best of 3"
        )


if __name__ == "__main__":
    main()
