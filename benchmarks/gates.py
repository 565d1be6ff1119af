"""What skipping saves: channels at batch 1, blocks, and tokens, beside the dense network in the same run.

python benchmarks/gates.py
"""

import jax
import jax.numpy as jnp
from _timing import in_turns, show

import jaxprune as jp
from jaxprune import gates

CHANNELS, SIZE, DEPTH = 128, 28, 4


def channels():
    """Convolutions of 3 x 3, 128 channels, 28 x 28, batch 1; half of the channels by top-k gates."""
    x = jax.random.normal(jax.random.key(0), (1, SIZE, SIZE, CHANNELS))
    layer = jp.linen.GatedConv(features=CHANNELS, kernel_size=(3, 3), k=0.5)
    weights = [{"params": layer.init(jax.random.key(i), x)["params"]} for i in range(DEPTH)]

    @jax.jit
    def dense(weights, x):
        for w in weights:
            conv = w["params"]["conv"]
            x = jax.nn.relu(gates.gathered_conv(x, conv["kernel"], bias=conv["bias"]))
        return x

    @jax.jit
    def masked(weights, x):
        for w in weights:
            x = jax.nn.relu(layer.apply(w, x, deterministic=True))
        return x

    @jax.jit
    def skipping(weights, x):
        index = None
        for w in weights:
            x, index = layer.apply(w, x, index, method="skip")
            x = jax.nn.relu(x)
        return gates.scattered(x, index, CHANNELS)

    difference = jnp.abs(skipping(weights, x) - masked(weights, x)).max()
    calls = {f.__name__: (lambda f=f: f(weights, x)) for f in (dense, masked, skipping)}
    seconds = in_turns(calls, rounds=25)
    show(f"{DEPTH} convolutions of {CHANNELS} channels, batch 1", seconds, "dense")
    print(
        f"skipping: {seconds['dense'] / seconds['skipping']:.2f}x faster, difference {difference:.1e}"
    )


def blocks():
    """Residual blocks of two convolutions, batch 1; every second one is closed."""
    n, count = 64, 8
    kernels = jax.random.normal(jax.random.key(1), (count, 2, 3, 3, n, n)) / (9 * n) ** 0.5
    x = jax.random.normal(jax.random.key(2), (1, SIZE, SIZE, n))
    gate = jp.linen.BlockGate()
    variables = [
        {"params": gate.init(jax.random.key(i), x, jnp.tanh)["params"]} for i in range(count)
    ]
    for i in range(count):  # open or shut, whatever comes in
        shut = jnp.full(1, 50.0 if i % 2 else -50.0)
        variables[i]["params"]["gate"]["expand"]["bias"] = shut

    def block(kernels):
        def run(x):
            y = jax.nn.relu(gates.gathered_conv(x, kernels[0]))
            return gates.gathered_conv(y, kernels[1])

        return run

    @jax.jit
    def dense(variables, x):
        for i in range(count):
            x = x + block(kernels[i])(x)
        return x

    @jax.jit
    def skipping(variables, x):
        for i in range(count):
            x = gate.apply(variables[i], x, block(kernels[i]), method="skip")
        return x

    seconds = in_turns(
        {f.__name__: (lambda f=f: f(variables, x)) for f in (dense, skipping)}, rounds=25
    )
    show("8 residual blocks, half of them closed, batch 1", seconds, "dense")
    print(f"skipping: {seconds['dense'] / seconds['skipping']:.2f}x faster")


def tokens():
    """A transformer's feed-forward blocks on half of the tokens, batch 32."""
    n, time, depth = 256, 64, 4
    keys = jax.random.split(jax.random.key(3), 2 * depth)
    weights = [
        (
            jax.random.normal(keys[2 * i], (n, 4 * n)) / n**0.5,
            jax.random.normal(keys[2 * i + 1], (4 * n, n)) / (4 * n) ** 0.5,
        )
        for i in range(depth)
    ]
    x = jax.random.normal(jax.random.key(4), (32, time, n))
    gate = jp.linen.TokenGate(capacity=0.5)
    variables = {"params": gate.init(jax.random.key(5), x, jnp.tanh)["params"]}
    block = lambda w: lambda x: jax.nn.gelu(x @ w[0]) @ w[1]

    @jax.jit
    def dense(x):
        for w in weights:
            x = x + block(w)(x)
        return x

    @jax.jit
    def routed(x):
        for w in weights:
            x = gate.apply(variables, x, block(w))
        return x

    seconds = in_turns({"dense": lambda: dense(x), "routed": lambda: routed(x)}, rounds=25)
    show("4 feed-forward blocks, half of the tokens, batch 32", seconds, "dense")
    print(f"routed: {seconds['dense'] / seconds['routed']:.2f}x faster")


if __name__ == "__main__":
    channels()
    blocks()
    tokens()
