"""A training step under masks beside the dense step: an MLP of 6 x 2048 x 2048, Adam, batch 128.

    python benchmarks/train_step.py

jaxpruner's step (masks in the state, gradients and parameters multiplied by them around the update) is
written out here, since the package is neither on PyPI nor runs on a current JAX.
"""

import jax
import jax.numpy as jnp
import optax
from _timing import in_turns, show, stepper

import jaxprune as jp

LAYERS, WIDTH, BATCH = 6, 2048, 128


def loss(params, x):
    for w in params.values():
        x = jax.nn.relu(x @ w)
    return jnp.mean(jnp.square(x))


def by_products(inner, masks):
    """jaxpruner: `(grads * masks)` in, and `(params + updates) * masks` out."""

    def update(grads, state, params):
        masks, inner_state = state
        grads = jax.tree.map(jnp.multiply, grads, masks)
        updates, inner_state = inner.update(grads, inner_state, params)
        new = jax.tree.map(lambda p, u, m: (p + u) * m, params, updates, masks)
        return jax.tree.map(jnp.subtract, new, params), (masks, inner_state)

    return optax.GradientTransformation(
        lambda p: (jax.tree.map(jnp.copy, masks), inner.init(p)), update
    )


def main():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = {str(i): 0.03 * jax.random.normal(k, (WIDTH, WIDTH)) for i, k in enumerate(keys)}
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    pruned, masks = jp.prune_tree(params, 0.8)
    adam = optax.adam(1e-3)
    as_numbers = jax.tree.map(lambda m: m.astype(jnp.uint8), masks)
    steps = {
        "dense": stepper(adam, loss, params, x),
        "masked_update": stepper(jp.masked_update(adam, masks), loss, pruned, x),
        "masked_update, packed": stepper(
            jp.masked_update(adam, masks, packed=True), loss, pruned, x
        ),
        "gradual, between changes": stepper(
            jp.optim.gradual(adam, jp.schedules.one_shot(0.8, at=1)), loss, pruned, x
        ),
        "products (jaxpruner)": stepper(by_products(adam, as_numbers), loss, pruned, x),
    }
    for step in steps.values():
        step()
        step()
    show(f"training step, {LAYERS} x {WIDTH}^2, batch {BATCH}", in_turns(steps, rounds=15), "dense")
    weights = LAYERS * WIDTH * WIDTH
    for packed in (False, True):
        state = jp.masked_update(adam, masks, packed=packed).init(params)
        print(f"masks, packed={packed}: {jp.nbytes(state.masks) / weights:.3f} bytes per weight")


if __name__ == "__main__":
    main()
