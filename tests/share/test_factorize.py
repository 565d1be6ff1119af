"""Low-rank and Tucker leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.structure._zoo import normal


def relative(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


def of_rank(r, m=24, n=20, seed=0):
    return normal(m, r, seed=seed) @ normal(r, n, seed=seed + 1)


def test_the_best_approximation():
    x = normal(24, 20)
    leaf = jp.factorize_tree({"w": x}, rank=5)["w"]
    s = jnp.linalg.svd(x, compute_uv=False)
    error = jnp.linalg.norm(leaf.materialize() - x)
    np.testing.assert_allclose(error, jnp.sqrt(jnp.sum(s[5:] ** 2)), rtol=1e-4)
    assert leaf.nbytes == 4 * 5 * 44


def test_targets():
    params = {"low": of_rank(2), "full": normal(24, 20, seed=5), "b": jnp.ones(3)}
    with pytest.warns(UserWarning, match="full"):
        tree = jp.factorize_tree(params, energy=0.999)
    assert tree["low"].rank == 2
    assert tree["full"] is params["full"]
    assert jp.factorize_tree(params, rank=0.25)["full"].rank == 5
    tree = jp.factorize_tree(params, budget=0.5)
    held = jp.nbytes(tree) - params["b"].nbytes
    assert held <= 0.5 * 4 * 2 * 480
    assert held > 0.4 * 4 * 2 * 480
    assert tree["full"].rank > tree["low"].rank
    assert jp.share.ranks_table(params, tree).row_count == 2


def test_statistics_keep_outputs():
    x = normal(200, 24) * jnp.logspace(-2, 1, 24)
    params, fn = (
        {"w": normal(24, 20, seed=1), "t": normal(20, 24, seed=2)},
        (lambda p, x: (x @ p["w"], x @ p["t"].T)),
    )
    stats = jp.calibrate(fn, params, [x], second_moment=True)
    diagonal = jp.calibrate(fn, params, [x])
    errors = []
    for known in (None, diagonal, stats):
        tree = jp.factorize_tree(params, rank=4, stats=known)
        outs = fn(jp.materialize_tree(tree), x)
        errors.append([relative(a, b) for a, b in zip(outs, fn(params, x), strict=True)])
    for plain, some, full in zip(*errors, strict=True):
        assert full <= some * 1.01 < plain


def test_stacks_heads_and_kernels():
    params = {"stack": normal(3, 16, 20), "q": normal(16, 4, 8), "k": normal(3, 3, 8, 16)}
    stack = jp.factorize_tree(params, rank=3, where="stack")["stack"]
    assert (stack.left.shape, stack.right.shape) == ((3, 16, 3), (3, 3, 20))
    np.testing.assert_allclose(stack[1].materialize(), stack.materialize()[1], rtol=1e-4, atol=1e-5)
    each = jax.vmap(lambda q: q.materialize())(stack)
    np.testing.assert_allclose(each, stack.materialize(), rtol=1e-4, atol=1e-5)
    q = jp.factorize_tree(params, rank=3, where="q", batch=0, tail=2)["q"]
    assert (q.left.shape, q.right.shape) == ((16, 3), (3, 4, 8))
    k = jp.factorize_tree(params, rank=3, where="k")["k"]
    assert (k.left.shape, k.right.shape) == ((3, 3, 8, 3), (3, 16))
    full = jp.factorize_tree({"k": of_rank(3, 72, 16).reshape(3, 3, 8, 16)}, rank=3)["k"]
    assert relative(full.materialize(), of_rank(3, 72, 16).reshape(3, 3, 8, 16)) < 1e-5


def test_tucker_and_cp_recover_what_they_can_express():
    a, core, b = normal(12, 3), normal(3, 3, 3, 4, seed=1), normal(4, 16, seed=2)
    kernel = jnp.einsum("ia,hwab,bo->hwio", a, core, b)
    leaf = jp.factorize_tree({"k": kernel}, energy=0.9999999, method="tucker")["k"]
    assert relative(leaf.materialize(), kernel) < 1e-3
    assert leaf.left.shape[-1] <= 3
    s, i, o = normal(9, 3), normal(12, 3, seed=1), normal(16, 3, seed=2)
    kernel = jnp.einsum("sr,ir,or->sio", s, i, o).reshape(3, 3, 12, 16)
    leaf = jp.factorize_tree({"k": kernel}, rank=3, method="cp")["k"]
    assert leaf.is_depthwise
    assert relative(leaf.materialize(), kernel) < 1e-2


def test_factors_train_and_quantize():
    params, x = {"w": of_rank(3)}, normal(32, 24, seed=4)
    target = x @ normal(24, 20, seed=9)
    run = jp.compressed(lambda p, x: x @ p["w"])
    tree = jp.factorize_tree(params, rank=6)
    loss = lambda t: jnp.mean((run(t, x) - target) ** 2)
    before, tx = loss(tree), optax.adam(0.05)
    state = tx.init(tree)
    for _ in range(40):
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    assert loss(tree) < 0.7 * before
    small = jp.quantize_tree(tree, bits=8)
    assert isinstance(small["w"].left, jp.QuantizedArray)
    assert relative(run(small, x), run(tree, x)) < 0.02
    assert relative(run(small, x), x @ small["w"].materialize()) < 1e-3
    shared = jp.qat.convert(jp.qat.prepare(tree, bits=8))
    assert relative(run(shared, x), run(tree, x)) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"rank": 21}, "more than the full rank"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 1.5}, "fraction"),
        ({"energy": 1.5}, r"\[0, 1\]"),
        ({"budget": 0.01}, "rank 1 of every leaf"),
        ({"rank": 2, "method": "tucker"}, "convolution kernels"),
        ({"rank": 2, "method": "qr"}, "expected one of"),
        ({"rank": 2, "tail": 2}, "no axis"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        jp.factorize_tree({"w": normal(24, 20)}, **change)


def test_bad_weights():
    with pytest.raises(ValueError, match="NaN"):
        jp.factorize_tree({"w": jnp.full((4, 4), jnp.inf)}, rank=1)
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda p: jp.factorize_tree(p, rank=1))({"w": normal(4, 4)})
