"""Removed equals masked, on networks that nobody designed."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jaxprune as jp
from tests.structure.test_compact import assert_close, random_masks

WIDTH = 6


UNARY = [
    jax.nn.relu,
    jnp.tanh,
    jax.nn.sigmoid,
    jax.nn.gelu,
    lambda x: x * 0.5,
    lambda x: x + 0.3,
    jnp.square,
    lambda x: x - x.mean(-1, keepdims=True),
    lambda x: x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-2),
    lambda x: jax.nn.softmax(x, -1),
    lambda x: x - jax.lax.stop_gradient(x.max(1, keepdims=True)),
    lambda x: jnp.cumsum(x, 1) / 3,
    lambda x: x[..., ::-1],
    lambda x: jnp.swapaxes(x.reshape(*x.shape[:-1], 2, -1), -1, -2).reshape(x.shape),
    lambda x: jnp.clip(x, -1.0, 2.0),
    lambda x: x * jnp.linspace(0.5, 1.5, x.shape[-1]),
]
BINARY = [
    lambda x, y: x + y,
    lambda x, y: x * jax.nn.sigmoid(y),
    jnp.maximum,
    lambda x, y: jnp.where(x > 0, x, y),
    lambda x, y: jnp.einsum("btc,bsc->bts", x, y) @ x / 9,
    lambda x, y: jnp.concatenate([x[..., :3], y[..., 3:]], -1),
]


def random_network(seed):
    """`(fn, params, x)`: a directed graph of operations on values of shape (batch, 3, channels)."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
    params, steps, shapes = {}, [], [4]
    for _ in range(rng.integers(4, 10)):
        kind = rng.random()
        i = int(rng.integers(max(0, len(shapes) - 3), len(shapes)))
        same = [j for j, n in enumerate(shapes) if n == shapes[i]]
        j = int(rng.choice(same))
        if kind < 0.45 or len(shapes) == 1:
            name, n = f"w{len(steps)}", int(rng.choice([4, WIDTH, WIDTH]))
            params[name] = jnp.asarray(rng.standard_normal((shapes[i], n)) / 2, jnp.float32)
            bias = f"b{len(steps)}" if rng.random() < 0.5 else None
            if bias:
                params[bias] = jnp.asarray(rng.standard_normal(n), jnp.float32)
            steps.append(("dense", i, (name, bias)))
            shapes.append(n)
        elif kind < 0.75:
            steps.append(("unary", i, int(rng.integers(len(UNARY)))))
            shapes.append(shapes[i])
        elif kind < 0.95:
            steps.append(("binary", i, (j, int(rng.integers(len(BINARY))))))
            shapes.append(shapes[i])
        else:
            steps.append(("concatenate", i, j))
            shapes.append(2 * shapes[i])
    params["out"] = jnp.asarray(rng.standard_normal((shapes[-1], 2)), jnp.float32)

    def fn(p, x):
        values = [x]
        for kind, i, extra in steps:
            v = values[i]
            if kind == "dense":
                v = v @ p[extra[0]]
                v = v + p[extra[1]] if extra[1] else v
            elif kind == "unary":
                v = UNARY[extra](v)
            elif kind == "binary":
                v = BINARY[extra[1]](v, values[extra[0]])
            else:
                v = jnp.concatenate([v, values[extra]], -1)
            values.append(v)
        return values[-1] @ p["out"]

    return fn, params, x


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_removed_equals_masked(seed):
    fn, params, x = random_network(seed)
    graph = jp.trace(fn, params, x)
    masks = random_masks(graph, 0.5, seed)
    # half of the rows and half of the columns of a shuffled axis can be all of it
    assume(all(min(shape) for shape in jp.structure.widths(graph, masks).values()))
    compact_fn, small = jp.compact(fn, params, masks, x)
    assert_close(fn(jp.apply_masks(params, masks), x), compact_fn(small, x), 1e-3)


def test_random_networks_do_shrink():
    """The test above is not empty: most networks have units, and lose some."""
    shrunk = 0
    for seed in range(20):
        fn, params, x = random_network(seed)
        graph = jp.trace(fn, params, x)
        _, small = jp.compact(fn, params, random_masks(graph, 0.5, seed), x)
        shrunk += sum(v.size for v in jax.tree.leaves(small)) < sum(
            v.size for v in jax.tree.leaves(params)
        )
    assert shrunk >= 10
