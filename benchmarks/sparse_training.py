"""Steps of sparse training beside the dense step: between moves of the masks, and where they move.

    python benchmarks/sparse_training.py            # transformer block, ResNet block, 25 M weights
    python benchmarks/sparse_training.py --networks transformer

A transformer block (width 512, 8 x 64 tokens), a ResNet block (64 channels, 32 images of 16 x 16), and an
MLP of 6 x 2048 x 2048 (25 M weights, batch 128), all under Adam. Times are the least of the rounds, taken
in turns.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from _timing import in_turns, show, stepper
from train_step import BATCH, LAYERS, WIDTH

import jaxprune as jp

KEY = jax.random.key(0)
NEVER = 10**6  # masks move at step 0 only


def transformer():
    """One block of width 512 with 8 heads, and what it runs on."""
    shapes = {"qkv": (512, 1536), "out": (512, 512), "up": (512, 2048), "down": (2048, 512)}
    keys = jax.random.split(KEY, len(shapes))
    params = {
        k: 0.03 * jax.random.normal(key, s)
        for key, (k, s) in zip(keys, shapes.items(), strict=True)
    }

    def loss(p, x):
        q, k, v = jnp.split((x @ p["qkv"]).reshape(8, 64, 24, 64), 3, axis=2)
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["out"]
        return jnp.mean(jnp.square(x + jax.nn.gelu(x @ p["up"]) @ p["down"]))

    return loss, params, jax.random.normal(KEY, (8, 64, 512))


def resnet():
    """One block of two 3 x 3 convolutions, and what it runs on."""
    keys = jax.random.split(KEY, 2)
    params = {
        k: 0.05 * jax.random.normal(key, (3, 3, 64, 64)) for k, key in zip("ab", keys, strict=True)
    }

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def loss(p, x):
        return jnp.mean(jnp.square(x + conv(jax.nn.relu(conv(x, p["a"])), p["b"])))

    return loss, params, jax.random.normal(KEY, (32, 16, 16, 64))


def mlp():
    """The 25 M weights of `train_step.py`."""
    keys = jax.random.split(KEY, LAYERS)
    params = {str(i): 0.03 * jax.random.normal(k, (WIDTH, WIDTH)) for i, k in enumerate(keys)}

    def loss(params, x):
        for w in params.values():
            x = jax.nn.relu(x @ w)
        return jnp.mean(jnp.square(x))

    return loss, params, jax.random.normal(KEY, (BATCH, WIDTH))


def transforms(moving):
    """Between moves; and, as `moving`, with masks made anew in every step."""
    adam = optax.adam(1e-3)
    phases = {"begin": 1, "end": NEVER, "sparse_steps": NEVER, "dense_steps": 1}
    still = {
        "dense": adam,
        "static_random": jp.optim.static_random(adam, 0.9, key=KEY),
        "gradual": jp.optim.gradual(adam, jp.schedules.one_shot(0.9, at=1)),
        "rigl": jp.optim.rigl(adam, 0.9, key=KEY, every=NEVER),
        "ac_dc, in a phase": jp.optim.ac_dc(adam, 0.9, **phases),
        "top_kast": jp.optim.top_kast(adam, 0.9, backward_sparsity=0.8, every=NEVER),
        "straight_through": jp.optim.straight_through(adam, 0.9, every=NEVER),
    }
    if not moving:
        return still
    return still | {
        "rigl, moving": jp.optim.rigl(adam, 0.9, key=KEY, every=1),
        "set_, moving": jp.optim.set_(adam, 0.9, key=KEY, every=1),
        "straight_through, masks anew": jp.optim.straight_through(adam, 0.9),
    }


NETWORKS = {"transformer": transformer, "resnet": resnet, "mlp": mlp}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=12)
    how = parser.parse_args()
    for name in how.networks:
        loss, params, x = NETWORKS[name]()
        calls = {k: stepper(t, loss, params, x) for k, t in transforms(name == "mlp").items()}
        for call in calls.values():
            call()
            jax.block_until_ready(call())
        show(
            f"training step, {name}, sparsity 0.9",
            in_turns(calls, rounds=how.rounds, of=min),
            "dense",
        )


if __name__ == "__main__":
    main()
