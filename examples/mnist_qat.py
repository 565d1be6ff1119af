"""Quantizing a CNN to 8 bits after training and to 4 bits in training, weights and activations.

    python examples/mnist_qat.py [--epochs 6] [--seed 0]

The images are those of the demo: `pip install "jaxprune[demo]"`.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune as jp
from jaxprune.cli import _cnn, _mnist


def fit(run, tree, data, epochs, rate, seed, name):
    """A stock training loop; the tree may hold any leaves that train."""
    steps = epochs * (len(data.train_labels) // _cnn.BATCH)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(tree, state, x, y):
        loss = lambda t: optax.softmax_cross_entropy_with_integer_labels(run(t, x), y).mean()
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    batches = _cnn.batches(data.train_images, data.train_labels, epochs, seed)
    for x, y in track(batches, total=steps, description=f"{name:<22}"):
        tree, state = step(tree, state, x, y)
    return tree


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = _mnist.load(arguments.seed)
    run = jp.compressed(_cnn.apply)
    start = _cnn.new_params(arguments.seed)
    params = fit(run, start, data, arguments.epochs, 2e-3, arguments.seed, "float")
    batches = [data.train_images[i : i + 250] for i in range(0, 1000, 250)]
    stats = jp.calibrate(_cnn.apply, params, batches, histogram=True)
    x = jnp.asarray(data.test_images)
    small, coarse = jp.quantize_tree(params, bits=8), jp.quantize_tree(params, bits=4)
    wide = {"range": "percentile", "percentile": 0.9999}
    trees = {
        "float": params,
        "int8": small,
        "int8, static activations": jp.quantize_activations(small, stats, **wide),
        "int8, dynamic activations": jp.quantize_activations(small, mode="dynamic"),
        "int4": coarse,
        "int4, biases corrected": jp.calibration.correct_biases(
            _cnn.apply, params, coarse, stats, x[:1]
        ),
        "int4, 4-bit activations": jp.quantize_activations(coarse, stats, 4, symmetric=False),
    }
    tuned = fit(
        run, jp.qat.prepare(params, bits=4), data, arguments.epochs, 1e-3, 1, "4-bit weights"
    )
    both = jp.quantize_activations(
        jp.qat.prepare(params, bits=4), stats, 4, symmetric=False, range="mse", training="lsq"
    )
    both = fit(run, both, data, arguments.epochs, 1e-3, 1, "and activations")
    trees["int4, trained"] = jp.qat.convert(tuned)
    trees["int4 and 4-bit activations, trained"] = jp.qat.convert(both)
    table = Table(title="CNN on 1,000 test images of MNIST")
    for column in ("model", "accuracy", "bytes", "largest leaf error"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, tree in trees.items():
        logits = jax.jit(run)(tree, x)
        right = float(jnp.mean(jnp.argmax(logits, -1) == data.test_labels))
        # trained weights moved: their error against the float network says nothing
        found = {} if name in ("float",) or "trained" in name else jp.quantize.errors(params, tree)
        worst = max((e.relative for e in found.values()), default=None)
        table.add_row(
            name, f"{right:.2%}", f"{jp.nbytes(tree):,}", "" if worst is None else f"{worst:.1%}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
