"""A sparse state-space model: images read row by row, with a tenth of the connections, by RigL.

    pip install "jaxprune[demo]"
    python examples/sparse_state_space.py

A diagonal linear recurrence between two products, as an `nnx` module. The products are sparse, with
sparsities of the ERK budget; the recurrence's rates are vectors and stay dense by themselves.
"""

import jax
import jax.numpy as jnp
import optax
from _images import batches, mnist
from flax import nnx

import jaxprune as jp


class StateSpace(nnx.Module):
    """`h <- a h + B x` for each state, all steps at once as a convolution; then `y = C h`."""

    def __init__(self, inputs, states, outputs, rngs):
        self.rate = nnx.Param(jnp.linspace(1.0, 5.0, states))
        self.read = nnx.Linear(inputs, states, rngs=rngs)
        self.write = nnx.Linear(states, outputs, rngs=rngs)

    def __call__(self, x):
        ago = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])  # (to, from)
        decay = nnx.sigmoid(self.rate[...]) ** jnp.maximum(ago, 0)[..., None]
        kernel = jnp.where(ago[..., None] >= 0, decay, 0)  # (to, from, states)
        return self.write(jnp.einsum("tfs,bfs->bts", kernel, self.read(x)))


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.first = StateSpace(14, 128, 96, rngs)
        self.head = nnx.Linear(14 * 96, 10, rngs=rngs)

    def __call__(self, rows):  # (batch, 14 rows, 14 pixels)
        x = nnx.relu(self.first(rows))
        return self.head(x.reshape(x.shape[0], -1))


def train(tx, steps):
    (images, labels), test = mnist()
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for rows in batches(steps):
        step(model, optimizer, images[rows], labels[rows])
    right = float(jnp.mean(model(test[0]).argmax(-1) == test[1]))
    return right, jp.sparsity(nnx.state(model, nnx.Param), where=".*kernel")


def main(steps=500):
    adam = optax.adam(3e-3)
    end = steps * 3 // 4
    found = {
        "dense": train(adam, steps),
        "RigL": train(
            jp.optim.rigl(
                adam,
                lambda params: jp.budgets.erk(params, 0.9),
                key=jax.random.key(0),
                every=20,
                end=end,
                drop=jp.schedules.cosine(0.0, initial=0.3, end=end),
            ),
            steps,
        ),
    }
    for name, (right, zeros) in found.items():
        print(f"{name:6s} {100 * right:.1f} % right, {100 * zeros:.1f} % of the weights zero")
    return found


if __name__ == "__main__":
    main()
