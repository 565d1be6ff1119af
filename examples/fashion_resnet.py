"""Remove channels from a Flax ResNet on Fashion-MNIST, and go on in plain Flax with a narrower one.

    pip install "jaxprune[cli,plots]"
    sudo apt install dataset-fashion-mnist   # or the four .gz files of any other source, with --data
    python examples/fashion_resnet.py

Trains a ResNet, removes channels until a half and a quarter of its FLOPs are left, builds the native Flax
module of the widths that are left, fine-tunes it towards the dense one, and prints accuracy, size and
measured latency.
"""

import argparse
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune as jp
from jaxprune.reports import human_bytes, human_seconds, plot_groups, seconds

BATCH = 128


class ResNet(nn.Module):
    """Three stages of residual blocks; every width is given, so that any compacted form can be built.

    Attributes:
      stages: per stage the channels of its residual stream; the first is also the width of the stem.
      inner: per block the channels between its two convolutions.
    """

    stages: tuple[int, ...] = (16, 32, 64)
    inner: tuple[int, ...] = (16, 16, 32, 32, 64, 64)

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
        conv = lambda n, size, stride, name: nn.Conv(
            n, (size, size), (stride, stride), use_bias=False, name=name
        )
        x = nn.relu(norm("stem_norm")(conv(self.stages[0], 3, 1, "stem")(x)))
        blocks = len(self.inner) // len(self.stages)
        for i, width in enumerate(self.inner):
            stage, stride = i // blocks, 2 if i and i % blocks == 0 else 1
            y = nn.relu(norm(f"norm{i}a")(conv(width, 3, stride, f"conv{i}a")(x)))
            y = norm(f"norm{i}b")(conv(self.stages[stage], 3, 1, f"conv{i}b")(y))
            if stride == 2:
                x = norm(f"norm{i}c")(conv(self.stages[stage], 1, 2, f"conv{i}c")(x))
            x = nn.relu(x + y)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def native(widths):
    """The Flax module whose parameters have these shapes, from `jp.structure.widths`."""
    out = lambda name: widths[f"params/{name}/kernel"][-1]
    inner = tuple(out(f"conv{i}a") for i in range(6))
    return ResNet(stages=(out("stem"), out("conv2b"), out("conv4b")), inner=inner)


def load(folder):
    """Images in [0, 1] of shape (n, 28, 28, 1), and labels."""

    def read(name):
        content = gzip.decompress((folder / name).read_bytes())
        rank = content[3]
        shape = np.frombuffer(content, ">i4", rank, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)

    def images(name):
        return np.asarray(read(name)[..., None] / 255, np.float32)

    train = (
        images("train-images-idx3-ubyte.gz"),
        read("train-labels-idx1-ubyte.gz").astype(np.int32),
    )
    test = images("t10k-images-idx3-ubyte.gz"), read("t10k-labels-idx1-ubyte.gz").astype(np.int32)
    return train, test


def fit(module, variables, data, epochs, rate, name, teacher=None):
    """Trains with Adam under a cosine schedule; a stock Flax loop.

    With the logits of a teacher, the loss is mostly the divergence from them, softened by 4 (Hinton et
    al., 2015).
    """
    images, labels = data
    soft = np.zeros((len(labels), 10), np.float32) if teacher is None else teacher
    steps = epochs * (len(labels) // BATCH)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(variables, state, x, y, s):
        def loss(params):
            full = {**variables, "params": params}
            logits, updated = module.apply(full, x, train=True, mutable=["batch_stats"])
            value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            if teacher is not None:
                value = 0.1 * value + 0.9 * jp.distill.kd(logits, s, temperature=4.0)
            return value, updated

        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, state

    state, rng = tx.init(variables["params"]), np.random.default_rng(0)
    order = np.concatenate(
        [rng.permutation(len(labels))[: len(labels) // BATCH * BATCH] for _ in range(epochs)]
    )
    for index in track(order.reshape(steps, BATCH), description=f"{name:<20}"):
        variables, state = step(variables, state, images[index], labels[index], soft[index])
    return variables


def predict(module, variables, images):
    """Logits of all images."""
    apply = jax.jit(module.apply)
    parts = [apply(variables, images[i : i + 500]) for i in range(0, len(images), 500)]
    return np.concatenate(parts)


def accuracy(module, variables, data):
    """Fraction of images whose largest logit is the label's."""
    images, labels = data
    return float(np.mean(np.argmax(predict(module, variables, images), -1) == labels))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument("--data", type=Path, default=default, help="folder of the four .gz files")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of training; fine-tuning takes as many"
    )
    parser.add_argument("--images", type=int, default=60000, help="use only so many for training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--picture", type=Path, help="draw which layers share channels to this file"
    )
    arguments = parser.parse_args()
    train, test = load(arguments.data)
    train = tuple(array[: arguments.images] for array in train)
    dense, image = ResNet(), jnp.zeros((1, 28, 28, 1))
    variables = dense.init(jax.random.key(arguments.seed), image)
    variables = fit(dense, variables, train, arguments.epochs, 2e-3, "train")
    graph = jp.trace(dense.apply, variables, image)
    longer = fit(dense, variables, train, arguments.epochs, 1e-3, "train on, dense")
    rows = [("dense", dense, variables), ("dense, trained on", dense, longer)]
    scores, teacher = jp.scores.magnitude(variables), predict(dense, variables, train[0])
    for left in (0.5, 0.25):
        # odd numbers of channels run no faster on a CPU than the next multiple of 8
        masks = jp.structure.unit_masks(graph, scores, flops=left, round_to=8)
        _, small = jp.compact(dense.apply, variables, masks, image, verify=True)
        narrow = native(jp.structure.widths(graph, masks))
        name = f"{1 / left:.0f}x fewer FLOPs"
        tuned = fit(narrow, small, train, arguments.epochs, 2e-3, name, teacher)
        rows.append((name, narrow, tuned))
    if arguments.picture:
        plot_groups(arguments.picture, graph, masks=masks)
    table = Table(title="ResNet on Fashion-MNIST, batch of 128 for the latency")
    for column in ("model", "test accuracy", "MFLOPs", "size", "latency", "faster"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    times = [seconds(module.apply, tree, test[0][:BATCH]) for _, module, tree in rows]
    for (name, module, tree), time in zip(rows, times, strict=True):
        cost = jp.trace(module.apply, tree, image).cost()
        table.add_row(
            name,
            f"{accuracy(module, tree, test):.2%}",
            f"{cost.flops / 1e6:.1f}",
            human_bytes(jp.nbytes(tree)),
            human_seconds(time),
            f"{times[0] / time:.2f}x",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
