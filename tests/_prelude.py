"""What the code of the README and of the docs takes as given: a network, data, and optimizers."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import jaxprune as jp

key = jax.random.key(0)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(key, seed), shape)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(32, 32, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.head = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def convolutions(count):
    """Parameters, and the function on them, of some convolutions with a head."""
    params = {f"Conv_{i}": {"kernel": 0.3 * normal(3, 3, 4, 4, seed=i)} for i in range(count)}
    params["head"] = normal(4, 8)

    def fn(params, images):
        for i in range(count):
            names = jax.lax.conv_dimension_numbers(
                images.shape, (3, 3, 4, 4), ("NHWC", "HWIO", "NHWC")
            )
            kernel = params[f"Conv_{i}"]["kernel"]
            images = jnp.tanh(
                jax.lax.conv_general_dilated(
                    images, kernel, (1, 1), "SAME", dimension_numbers=names
                )
            )
        return images.mean((1, 2)) @ params["head"]

    return params, fn


model = Network(nnx.Rngs(0))
graphdef, params = nnx.split(model)
x, labels = normal(16, 32), jnp.arange(16) % 8
batches = [(normal(16, 32, seed=i),) for i in range(2)]


def apply(params, x):
    return nnx.merge(graphdef, params)(x)


def model_loss(y):
    return jnp.mean(y**2)


grads = jax.grad(lambda p: model_loss(apply(p, x)))(params)
masks = jp.prune_tree(params, 0.5)[1]
opt_state = jp.masked_update(optax.adamw(1e-3), masks).init(params)
stats = jp.calibrate(apply, params, batches)
student_params, student = convolutions(2)
teacher_params, teacher = convolutions(4)
images = jax.random.uniform(key, (16, 6, 6, 4))


def hard_loss(y, batch):
    return jnp.mean(y**2)


block, tokens, importance = jnp.tanh, normal(2, 40, 8), normal(2, 40)


# of docs/gates.md
def task(y, batch):
    return jnp.mean(y**2)


def loss(x):
    return jnp.sum(x**2)


def example_loss(x, y):
    return jnp.mean(x, -1)


examples = [(x, labels)]
logits, actions, reward, value = normal(4, 3), jnp.ones((4, 3)), normal(4), normal(4, seed=1)


# of the README: a decoder of the example, and a small convolutional network
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _decoder import Config, Decoder, empty_cache  # noqa: E402

config = Config(vocabulary=64, layers=2, width=64, heads=4, kv_heads=2, neurons=128)
decoder = Decoder(config, nnx.Rngs(0))
text = jnp.arange(48).reshape(2, 24) % 64
cache, position = empty_cache(config, 2, 64), jnp.int32(0)
pool = lambda x: x.mean((1, 2))
cnn = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu, nn.Conv(32, (3, 3)), nn.relu, pool, nn.Dense(4)])
