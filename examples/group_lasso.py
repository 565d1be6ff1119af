"""Group lasso that ends in a compacted network: units become exactly zero, and are removed.

    pip install "jaxprune[demo]"
    python examples/group_lasso.py

`jp.trace` finds the units of any function, here channels and neurons of a Flax CNN. A proximal step after
each step of Adam shrinks the norm of each; what ends at zero goes, and what is left trains on without the
penalty.
"""

import jax
import numpy as np
import optax
from _images import batches, mnist
from flax import linen as nn

import jaxprune as jp


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), (2, 2))(x[..., None]))
        x = nn.relu(nn.Conv(32, (3, 3), (2, 2))(x))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def train(fn, tx, params, steps, seed):
    (images, labels), _ = mnist()

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for rows in batches(steps, seed=seed):
        params, state = step(params, state, images[rows], labels[rows])
    return params


def main(steps=600):
    _, (images, labels) = mnist()
    fn = lambda params, x: CNN().apply({"params": params}, x)
    right = lambda fn, params: float(np.mean(fn(params, images).argmax(-1) == labels))
    params = CNN().init(jax.random.key(0), images[:1])["params"]
    graph = jp.trace(fn, params, images[:1])

    lasso = jp.optim.proximal_group_lasso(optax.adam(2e-3), 0.3, graph=graph, learning_rate=2e-3)
    params = train(fn, lasso, params, steps, seed=0)
    masks = jp.optim.zero_units(graph, params)
    small_fn, small = jp.compact(fn, params, masks, images[:1])
    same = np.allclose(small_fn(small, images), fn(params, images), rtol=1e-3, atol=1e-3)
    small = train(small_fn, optax.adam(1e-3), small, steps // 2, seed=1)

    flops = [jp.trace(f, p, images[:1]).cost().flops for f, p in ((fn, params), (small_fn, small))]
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    print(f"{count(params)} -> {count(small)} parameters, {flops[0]} -> {flops[1]} FLOPs")
    print(
        f"before {100 * right(fn, params):.1f} % right, after {100 * right(small_fn, small):.1f} %"
    )
    return right(small_fn, small), count(small) / count(params), flops[1] / flops[0], same


if __name__ == "__main__":
    main()
