"""Curvature in blocks and on the diagonal, and distances of filters: against definitions spelled out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.scores.test_data import X, Y, flat, in_flat, loss, net, normal

KEY = jax.random.key(0)


def gradients_by_hand(params):
    run, w = in_flat(params), flat(params)
    return np.array([jax.grad(run)(w, X[i : i + 1], Y[i : i + 1]) for i in range(len(X))])


@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize("microbatch", [4, 100])
def test_blocks_by_explicit_inverses(size, microbatch):
    params = net()
    batches = [(X[:5], Y[:5]), [X[5:], Y[5:]]]
    blocks = jp.scores.fisher_blocks(loss, params, batches, block_size=size, microbatch=microbatch)
    found = jp.scores.obs(params, blocks, damping=0.05)
    g = gradients_by_hand(params)
    parts = {"a": g[:, :15].reshape(-1, 3, 5), "b": g[:, 15:].reshape(-1, 5, 2)}
    for name, grads in parts.items():
        n, inputs, outputs = grads.shape
        damp = 0.05 * np.mean(grads**2)
        assert blocks[name]["kernel"].shape[0] == outputs * -(-inputs // min(size, inputs))
        for o in range(outputs):
            for start in range(0, inputs, size):
                part = grads[:, start : start + size, o].astype(np.float64)
                fisher = part.T @ part / n + damp * np.eye(part.shape[1])
                w = np.asarray(params[name]["kernel"])[start : start + size, o]
                wanted = w**2 / (2 * np.diag(np.linalg.inv(fisher)))
                got = found[name]["kernel"][start : start + size, o]
                np.testing.assert_allclose(got, wanted, rtol=2e-3)


def test_blocks_of_one_are_the_diagonal():
    params = net()
    blocks = jp.scores.fisher_blocks(loss, params, [(X, Y)], block_size=1)
    diagonal = jp.scores.fisher_diagonal(loss, params, [(X, Y)])
    found = jp.scores.obs(params, blocks, damping=1e-6)
    np.testing.assert_allclose(flat(found), flat(jp.scores.fisher(params, diagonal)), rtol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_small_and_large_gradients(scale):
    params = {"w": normal(6, 3)}
    run = lambda p, x: scale * jnp.mean(x @ p["w"])
    blocks = jp.scores.fisher_blocks(run, params, [normal(4, 6, seed=1)], block_size=4)
    scores = jp.scores.obs(params, blocks)["w"]
    assert bool(jnp.isfinite(scores).all())
    assert bool((scores > 0).all()) or scale == 0


def test_stacked_and_convolution_leaves_are_scored_layer_by_layer():
    params = {"w": normal(2, 4, 4)}

    def run(p, x):
        return jnp.mean(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0])

    x = normal(3, 4, seed=1)
    uses = jp.uses(run, params, x)
    blocks = jp.scores.fisher_blocks(run, params, [x], block_size=3, uses=uses)
    assert blocks["w"].shape == (2 * 4 * 2, 3, 3)
    found = jp.scores.obs(params, blocks, uses=uses)["w"]
    # the second layer alone, behind the first
    tail = lambda p, h: jnp.mean(jnp.tanh(h @ p["w"]))
    one, hidden = {"w": params["w"][1]}, jnp.tanh(x @ params["w"][0])
    alone = jp.scores.fisher_blocks(tail, one, [hidden], block_size=3)
    np.testing.assert_allclose(alone["w"], blocks["w"][8:], rtol=1e-3, atol=1e-9)
    assert found.shape == (2, 4, 4)
    filters = jp.scores.fpgm(params, uses=uses)["w"]
    np.testing.assert_allclose(filters[1], jp.scores.fpgm(one)["w"], rtol=1e-4)


def test_errors_of_blocks():
    params = net()
    blocks = jp.scores.fisher_blocks(loss, params, [(X, Y)], block_size=2)
    with pytest.raises(ValueError, match=r"'a/bias'.*same uses= and where="):
        jp.scores.obs(params, blocks, where="a/.*")
    with pytest.raises(ValueError, match="damping"):
        jp.scores.obs(params, blocks, damping=0.0)
    with pytest.raises(ValueError, match="block_size"):
        jp.scores.fisher_blocks(loss, params, [(X, Y)], block_size=0)
    with pytest.raises(ValueError, match="at least one"):
        jp.scores.fisher_blocks(loss, params, [])
    with pytest.raises(ValueError, match="scalar float"):
        jp.scores.hessian_diagonal(lambda p: p["a"]["kernel"], params, key=KEY)
    with pytest.raises(ValueError, match="probes"):
        jp.scores.hessian_diagonal(loss, params, X, Y, key=KEY, probes=0)
    with pytest.raises(ValueError, match="fpgm: NaN in the score of leaf 'w'"):
        jp.scores.fpgm({"w": jnp.full((2, 2), jnp.nan)})


def test_the_diagonal_of_the_hessian():
    params = net()
    wanted = jnp.diag(jax.hessian(in_flat(params))(flat(params)))
    estimate = lambda key, probes: flat(
        jp.scores.hessian_diagonal(loss, params, X, Y, key=key, probes=probes)
    )
    few, many = (jax.jit(estimate, static_argnums=1)(KEY, n) for n in (16, 4096))
    error = lambda found: float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    assert error(many) < 0.05 < error(few)
    tree = jp.scores.hessian_diagonal(loss, params, X, Y, key=KEY)
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert tree["a"]["bias"].shape == ()
    both = jax.vmap(lambda k: estimate(k, 16))(jax.random.split(KEY, 2))
    assert bool((both[0] != both[1]).any())
    np.testing.assert_allclose(estimate(KEY, 16), few, rtol=1e-4, atol=1e-5)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, params)
    near = flat(jp.scores.hessian_diagonal(loss, low, X, Y, key=KEY))
    assert np.corrcoef(near, few)[0, 1] > 0.99
    assert near.dtype == jnp.float32


def convolved(p, x):
    names = jax.lax.conv_dimension_numbers(x.shape, p["kernel"].shape, ("NHWC", "HWIO", "NHWC"))
    y = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=names)
    return y @ p["head"]


def test_fpgm_by_all_distances():
    w = normal(3, 2, 4, 7)
    w = w.at[..., 1].set(w[..., 0])  # two equal filters
    params = {"kernel": w, "head": normal(7, 1)}
    uses = jp.uses(convolved, params, normal(1, 5, 5, 4))
    found = jp.scores.fpgm(params, uses=uses)
    rows = np.asarray(w, np.float64).reshape(-1, 7).T
    wanted = np.linalg.norm(rows[:, None] - rows[None], axis=-1).sum(1)
    np.testing.assert_allclose(found["kernel"], np.broadcast_to(wanted, w.shape), rtol=1e-4)
    assert bool(jnp.isinf(found["head"]).all())  # a lone filter has nothing to be near to
    jitted = jax.jit(lambda p: jp.scores.fpgm(p, uses=uses))(params)
    np.testing.assert_allclose(jitted["kernel"], found["kernel"], rtol=1e-5)
    assert jitted["kernel"].dtype == jnp.float32
    with pytest.raises(ValueError, match="'kernel' of .*a window, or a stack of layers"):
        jp.scores.fpgm(params)


def test_units_by_fpgm():
    params = {"a": {"kernel": normal(4, 12)}, "b": {"kernel": normal(12, 3, seed=1)}}
    run = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    graph = jp.trace(run, params, normal(2, 4))
    scores = jp.scores.fpgm(params, uses=graph)
    masks = jp.structure.unit_masks(graph, scores, sparsity=0.5)
    kept = np.asarray(masks["a"]["kernel"]).all(0)
    distances = np.asarray(scores["a"]["kernel"][0])
    assert kept.sum() == 6
    assert distances[kept].min() > distances[~kept].max()
