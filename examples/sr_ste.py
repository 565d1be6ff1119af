"""2:4 weights from scratch with SR-STE, on a `flax.nnx` module.

    pip install "jaxprune[demo]"
    python examples/sr_ste.py

The optimizer trains dense weights; the network runs on the two largest of every four along the axis that
products sum over, and its gradient reaches all of them. Weights that are left out shrink (`decay`), so
that the masks settle.
"""

import jax
import jax.numpy as jnp
import optax
from _images import batches, mnist
from flax import nnx

import jaxprune as jp


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(196, 256, rngs=rngs)
        self.second = nnx.Linear(256, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x.reshape(x.shape[0], -1)))
        return self.head(nnx.relu(self.second(x)))


def main(steps=600):
    (images, labels), test = mnist()
    graphdef, params = nnx.split(MLP(nnx.Rngs(0)), nnx.Param)
    run = lambda params, x: nnx.merge(graphdef, params)(x)
    uses = jp.uses(run, params, images[:1])  # where products sum
    tx = jp.optim.straight_through(
        optax.adam(1e-3), 0.5, pattern=jp.masks.NM(2, 4), decay=2e-4, uses=uses
    )
    state = tx.init(params)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(run(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss)(jp.optim.sparse_params(state, params), x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jp.optim.metrics(state)["masks/churn"]

    churn = []
    for rows in batches(steps):
        params, state, moved = step(params, state, images[rows], labels[rows])
        churn.append(float(moved))
    final = jp.optim.sparse_params(state, params)
    right = float(jnp.mean(run(final, test[0]).argmax(-1) == test[1]))
    model = nnx.merge(graphdef, final)  # a plain nnx module with 2:4 weights
    groups = (model.first.kernel[...] != 0).reshape(-1, 4, 256).sum(1)
    print(f"{100 * right:.1f} % right; at most {int(groups.max())} of every 4 weights")
    tenth = max(steps // 10, 1)
    print(
        f"weights that changed sides a step: first {sum(churn[:tenth]) / tenth:.4f}, "
        f"last {sum(churn[-tenth:]) / tenth:.4f} of those kept"
    )
    return right, int(groups.max()), sum(churn[:tenth]), sum(churn[-tenth:])


if __name__ == "__main__":
    main()
