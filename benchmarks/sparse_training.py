"""Steps of sparse training beside the dense step: at steady state, and where masks move.

    python benchmarks/sparse_training.py

An MLP of 6 x 2048 x 2048 (25 M weights), Adam, batch 128.
"""

import jax
import jax.numpy as jnp
import optax
from _timing import in_turns, show
from train_step import BATCH, LAYERS, WIDTH, loss, stepper

import jaxprune as jp

KEY = jax.random.key(0)
NEVER = 10**6  # masks move at step 0 only


def main():
    keys = jax.random.split(KEY, LAYERS)
    params = {str(i): 0.03 * jax.random.normal(k, (WIDTH, WIDTH)) for i, k in enumerate(keys)}
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    adam = optax.adam(1e-3)
    phases = {"begin": 1, "end": NEVER, "sparse_steps": NEVER, "dense_steps": 1}
    transforms = {
        "dense": adam,
        "static_random": jp.optim.static_random(adam, 0.9, key=KEY),
        "rigl, between moves": jp.optim.rigl(adam, 0.9, key=KEY, every=NEVER),
        "ac_dc, in a phase": jp.optim.ac_dc(adam, 0.9, **phases),
        "top_kast, between moves": jp.optim.top_kast(adam, 0.9, backward_sparsity=0.8, every=NEVER),
        "rigl, moving": jp.optim.rigl(adam, 0.9, key=KEY, every=1),
        "set_, moving": jp.optim.set_(adam, 0.9, key=KEY, every=1),
        "straight_through, masks anew": jp.optim.straight_through(adam, 0.9),
    }
    steps = {name: stepper(tx, params, x) for name, tx in transforms.items()}
    for step in steps.values():
        step()
        step()
    title = f"training step, {LAYERS} x {WIDTH}^2, batch {BATCH}, sparsity 0.9"
    show(title, in_turns(steps, rounds=9), "dense")
    assert jnp.isfinite(loss(params, x))


if __name__ == "__main__":
    main()
