"""Go on in plain Flax after channels are removed: the native module of the widths that are left.

    python examples/native_modules.py

`jp.structure.widths` gives the shape of every parameter once masked units are gone. A module whose widths
are attributes is built anew from them, linen and nnx, and holds the small parameters as they are.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jaxprune as jp


class LinenCNN(nn.Module):
    widths: tuple[int, int] = (32, 64)

    @nn.compact
    def __call__(self, x):
        for n in self.widths:
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(n, (3, 3))(x)))
        return nn.Dense(10)(x.mean((1, 2)))


class NnxCNN(nnx.Module):
    def __init__(self, widths, rngs):
        first, second = widths
        self.conv1 = nnx.Conv(3, first, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(first, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(second, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(second, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((1, 2)))


def half_of_each(graph, scores):
    """Masks that leave half the FLOPs, by an equal share of each group.

    These weights were never trained: from group to group they differ by their initialization only, and
    ranked together (the default, for trained ones) the units of one group would all go first.
    """
    return jp.structure.unit_masks(graph, scores, flops=0.5, scope="leaf", round_to=8)


def linen(x):
    """A linen module of half the FLOPs, its variables, and what the masked original gives."""
    model = LinenCNN()
    variables = model.init(jax.random.key(0), x)
    graph = jp.trace(model.apply, variables, x)
    masks = half_of_each(graph, jp.scores.magnitude(variables))
    _, small = jp.compact(model.apply, variables, masks, x)
    widths = jp.structure.widths(graph, masks)
    native = LinenCNN(tuple(widths[f"params/Conv_{i}/kernel"][-1] for i in range(2)))
    return native, small, model.apply(jp.apply_masks(variables, masks), x)


def by_nnx(x):
    """An nnx module of half the FLOPs, and what the masked original gives."""
    model = NnxCNN((32, 64), nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    call = lambda state, x: nnx.merge(graphdef, state)(x)
    graph = jp.trace(call, state, x)
    masks = half_of_each(graph, jp.scores.magnitude(state))
    _, small = jp.compact(call, state, masks, x)
    widths = jp.structure.widths(graph, masks)
    native = NnxCNN((widths["conv1/kernel"][-1], widths["conv2/kernel"][-1]), nnx.Rngs(0))
    nnx.update(native, small)
    return native, call(jp.apply_masks(state, masks), x)


def main():
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    native, small, expected = linen(x)
    print("linen:", native.widths, "difference", jnp.abs(native.apply(small, x) - expected).max())
    module, expected = by_nnx(x)
    widths = module.conv1.out_features, module.conv2.out_features
    print("nnx:  ", widths, "difference", jnp.abs(module(x) - expected).max())


if __name__ == "__main__":
    main()
