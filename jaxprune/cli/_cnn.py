"""The demo's network and its training loop: plain Flax linen, a stock `TrainState`."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from jaxprune._types import Params

BATCH = 125


class CNN(nn.Module):
    """Two convolutions and two dense layers; 421,642 parameters at full width.

    Attributes:
      features: channels of the convolutions and neurons of the hidden layer.
    """

    features: tuple[int, int, int] = (32, 64, 128)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (batch, 10) of images of shape (batch, 28, 28, 1)."""
        first, second, hidden = self.features
        x = nn.relu(nn.Conv(first, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(second, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def sized_for(params: Params) -> CNN:
    """The network of the widths that some parameters have."""
    first, second, hidden = (
        params[name]["bias"].shape[0] for name in ("Conv_0", "Conv_1", "Dense_0")
    )
    return CNN((first, second, hidden))


def new_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A training state for some parameters and an optimizer."""
    return TrainState.create(apply_fn=sized_for(params).apply, params=params, tx=tx)


def apply(params: Params, images: jax.Array) -> jax.Array:
    """Logits of images, from parameters of any width."""
    logits: Any = sized_for(params).apply({"params": params}, images)
    return logits


def new_params(seed: int) -> Params:
    """Freshly initialised parameters."""
    return CNN().init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))["params"]


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """One step of cross-entropy training."""

    def loss_fn(params: Params) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


@jax.jit
def accuracy(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Fraction of images whose largest logit is the label's."""
    logits: Any = apply(params, images)
    return jnp.mean(jnp.argmax(logits, -1) == labels)


def batches(
    images: np.ndarray, labels: np.ndarray, epochs: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled batches of whole epochs."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for index in rng.permutation(len(labels)).reshape(-1, BATCH):
            yield images[index], labels[index]


def train(
    state: TrainState, data: Iterator[tuple[Any, Any]], on_step: Callable[[], None]
) -> TrainState:
    """Runs `train_step` over all batches."""
    for images, labels in data:
        state = train_step(state, images, labels)
        on_step()
    return state
