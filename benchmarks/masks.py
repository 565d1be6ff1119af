"""A global 80 % mask of 25 M weights, beside NumPy's quickselect and a mask by sorting.

    python benchmarks/masks.py [--compile]

jaxpruner's magnitude mask (`argsort` of each leaf, then a scatter of ones into zeros) is written out
here with the same calls, since the package is neither on PyPI nor runs on a current JAX.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from _timing import in_turns, show

import jaxprune as jp

SPARSITY = 0.8
SIZE = 25_000_000


def by_argsort(scores):
    """jaxpruner's top-k mask of one leaf."""
    flat = scores.reshape(-1)
    keep = round((1 - SPARSITY) * flat.size)
    index = jnp.argsort(-flat)[:keep]
    return jnp.zeros(flat.shape, jnp.uint8).at[index].set(1).reshape(scores.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--compile", action="store_true", help="also time a first call on 400 leaves"
    )
    arguments = parser.parse_args()
    x = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    trees = {
        "one leaf": {"w": jnp.asarray(x).reshape(5000, 5000)},
        "25 leaves": {
            str(i): jnp.asarray(a).reshape(1000, 1000) for i, a in enumerate(x.reshape(25, -1))
        },
        "rounded to 1/32": {"w": jnp.round(32 * jnp.asarray(x).reshape(5000, 5000))},
        "90 % zeros": {"w": jnp.asarray(np.where(np.abs(x) > 1.65, x, 0)).reshape(5000, 5000)},
    }
    build = jax.jit(lambda tree: jp.masks.from_scores(jp.scores.magnitude(tree), SPARSITY))
    magnitudes, rank = np.abs(x), round(SPARSITY * SIZE)
    read = jax.jit(jnp.sum)
    calls = {
        "np.partition": lambda: np.partition(magnitudes, rank),
        "np.partition and compare": lambda: magnitudes > np.partition(magnitudes, rank)[rank],
        "one read of the data": lambda: read(trees["one leaf"]["w"]),
    }
    for name, tree in trees.items():
        calls[f"jaxprune, {name}"] = lambda tree=tree: build(tree)
    eager = trees["25 leaves"]
    calls["jaxprune, 25 leaves, not jitted"] = lambda: jp.prune_tree(eager, SPARSITY)[1]
    seconds = in_turns(calls)
    sort = jax.jit(by_argsort)
    leaf = jnp.abs(trees["25 leaves"]["0"])
    seconds["argsort per leaf (jaxpruner)"] = (
        25 * in_turns({"sort": lambda: sort(leaf)}, rounds=3)["sort"]
    )
    show(f"global {SPARSITY:.0%} mask of {SIZE:,} weights", seconds, "np.partition")
    reads = seconds["jaxprune, one leaf"] / seconds["one read of the data"]
    print(f"jaxprune, one leaf: {reads:.1f} reads of the data")
    if arguments.compile:
        many = {str(i): jnp.asarray(a).reshape(250, 250) for i, a in enumerate(x.reshape(400, -1))}
        start = time.perf_counter()
        jax.block_until_ready(build(many))
        print(
            f"first call on 400 leaves, compilation included: {time.perf_counter() - start:.1f} s"
        )


if __name__ == "__main__":
    main()
