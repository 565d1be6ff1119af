"""RigL in a stock Flax training loop: connections move to where gradients are large.

    pip install "jaxprune[demo]"
    python examples/rigl.py

Trains LeNet-300-100 three times: dense, with 2 % of its weights at random, and with 2 % that move by
RigL. The lines that a dense script would not have are marked `# +`.
"""

import jax
import optax
from _images import batches, mnist
from flax import linen as nn
from flax.training.train_state import TrainState

import jaxprune as jp  # +


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(300)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(nn.relu(nn.Dense(100)(x)))


def train(tx, steps):
    (images, labels), test = mnist()
    params = MLP().init(jax.random.key(0), images[:1])["params"]
    state = TrainState.create(apply_fn=MLP().apply, params=params, tx=tx)

    @jax.jit
    def step(state, x, y):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    history = []
    for i, rows in enumerate(batches(steps)):
        state, loss = step(state, images[rows], labels[rows])
        if i % 20 == 0 and hasattr(state.opt_state, "masks"):
            history.append(jp.optim.metrics(state.opt_state) | {"loss": loss})  # +
    right = MLP().apply({"params": state.params}, test[0]).argmax(-1) == test[1]
    return float(right.mean()), state, history


def main(steps=800, plot=None):
    adam, key = optax.adam(1e-3), jax.random.key(1)
    sparsity = lambda params: jp.budgets.erk(params, 0.98)  # +
    end = steps * 3 // 4
    rigl = jp.optim.rigl(  # +
        adam,
        sparsity,
        key=key,
        every=20,
        end=end,
        drop=jp.schedules.cosine(0.0, initial=0.3, end=end),
    )
    found = {}
    for name, tx in {
        "dense": adam,
        "static": jp.optim.static_random(adam, sparsity, key=key),
        "RigL": rigl,
    }.items():
        found[name], state, history = train(tx, steps)
        zeros = jp.sparsity(state.params, where=".*kernel")
        print(f"{name:7s} {100 * found[name]:.1f} % right, {100 * zeros:.1f} % of the weights zero")
    if plot:
        jp.reports.plot_training(plot, history, steps=range(0, steps, 20), title="RigL")
    jp.optim.check(state.opt_state, state.params)  # an error if a pruned weight came back
    return found


if __name__ == "__main__":
    main(plot="rigl.png")
