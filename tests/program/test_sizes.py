"""Symbolic sizes: traces, compact functions and compressed ones under `jax.export`, for every batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxprune as jp
from jaxprune.program import sized


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def mixed(p, x):
    """Batches merged with channels and split again, means, concatenations, slices."""
    h = jax.nn.relu(x @ p["up"] + p["b"])  # (batch, 4, 8)
    h = h.reshape(-1, 8)[:, None].reshape(x.shape[0], 4, 8)
    h = jnp.concatenate([h.mean(1, keepdims=True), 2 * h[:, 1:3]], 1)
    return h.reshape(x.shape[0], -1).reshape(x.shape[0], 3, 8) @ p["down"]


def scanned(p, x):
    step = lambda h, w: (jnp.tanh(h @ w), None)
    return jax.lax.scan(step, x @ p["up"] + p["b"], jnp.stack([jnp.eye(8)] * 2))[0] @ p["down"]


KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "up": jax.random.normal(KEYS[0], (6, 8)),
    "b": jax.random.normal(KEYS[1], (8,)),
    "down": jax.random.normal(KEYS[2], (8, 3)),
}
KEEP = jnp.arange(8) % 2 == 0
MASKS = {"up": KEEP[None], "b": KEEP, "down": KEEP[:, None]}


def symbolic(text="b"):
    (b,) = export.symbolic_shape(text)
    return jax.ShapeDtypeStruct((b, 4, 6), jnp.float32)


def test_compact_function_for_any_batch():
    x = jax.random.normal(KEYS[3], (5, 4, 6))
    compact_fn, small = jp.compact(mixed, PARAMS, MASKS, x, verify=True)
    assert small["up"].shape == (6, 4)
    exported = export.export(jax.jit(compact_fn))(abstract(small), symbolic())
    for n in (1, 5):
        expected = mixed(jp.apply_masks(PARAMS, MASKS), x[:n])
        np.testing.assert_allclose(exported.call(small, x[:n]), expected, atol=1e-5)


def test_graph_is_that_of_any_batch():
    known = jp.trace(mixed, PARAMS, jnp.ones((5, 4, 6)))
    graph = jp.trace(mixed, abstract(PARAMS), symbolic("2*b"))
    assert [(g.name, g.size) for g in graph.groups] == [(g.name, g.size) for g in known.groups]
    assert [member for member, _ in graph.frozen] == [member for member, _ in known.frozen]
    with pytest.raises(ValueError, match="symbolic"):
        graph.cost()


def test_compressed_function_for_any_batch():
    tree, run = jp.quantize_tree(PARAMS), jp.compressed(mixed)
    exported = export.export(jax.jit(lambda x: run(tree, x)))(symbolic())
    x = jax.random.normal(KEYS[3], (300, 4, 6))
    for n in (1, 2, 300):
        np.testing.assert_allclose(exported.call(x[:n]), run(tree, x[:n]), atol=1e-3)


def test_expressions_of_sizes():
    a, b = export.symbolic_shape("a, b")
    na, nb = sized(a), sized(b)
    assert sized((2 * a + b, (a * b) // 6, 7)) == (2 * na + nb, na * nb // 6, 7)
    assert sized({"n": a % 5, "f": len}) == {"n": na % 5, "f": len}
