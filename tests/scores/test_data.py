"""Scores that look at data: against definitions spelled out, and as functions among others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def net():
    return {
        "a": {"kernel": normal(3, 5), "bias": 0.1 * normal(5, seed=1)},
        "b": {"kernel": normal(5, 2, seed=2), "count": jnp.array(3)},
    }


def fn(p, x):
    return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"]


def loss(p, x, y):
    return jnp.mean(jnp.square(fn(p, x) - y))


X, Y = normal(6, 3, seed=3), normal(6, 2, seed=4)
KERNELS = ("a", "b")

SCORES = {
    "snip": lambda p, **kw: jp.scores.snip(loss, p, X, Y, **kw),
    "grasp": lambda p, **kw: jp.scores.grasp(loss, p, X, Y, **kw),
    "synflow": lambda p, **kw: jp.scores.synflow(fn, p, X[:1], **kw),
    "obs": lambda p, **kw: of_blocks(loss, p, **kw),
}


def of_blocks(loss, p, **kw):
    blocks = jp.scores.fisher_blocks(loss, p, [(X, Y)], block_size=2, **kw)
    return jp.scores.obs(p, blocks, **kw)


def flat(tree):
    return jnp.concatenate([tree[name]["kernel"].ravel() for name in KERNELS])


def in_flat(p):
    """The loss as a function of one vector, for explicit derivatives."""

    def run(vector, x=X, y=Y):
        cut = p["a"]["kernel"].size
        parts = vector[:cut].reshape(3, 5), vector[cut:].reshape(5, 2)
        own = {n: {**p[n], "kernel": w} for n, w in zip(KERNELS, parts, strict=True)}
        return loss(own, x, y)

    return run


def check(tree, like):
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    for s, p in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert s.dtype == jnp.float32
        assert s.shape == (p.shape if p.ndim > 1 else ())
        assert s.ndim or jnp.isinf(s)


@pytest.mark.parametrize("name", SCORES)
def test_under_jit_vmap_shards_and_in_bfloat16(name):
    params = net()
    score = SCORES[name]
    found = score(params)
    check(found, params)
    wanted = flat(found)
    np.testing.assert_allclose(flat(jax.jit(score)(params)), wanted, rtol=1e-4, atol=1e-6)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    np.testing.assert_allclose(
        flat(jax.tree.map(lambda x: x[0], jax.vmap(score)(two))), wanted, rtol=1e-4, atol=1e-6
    )
    mesh = Mesh(np.array(jax.devices()).reshape(-1)[:5], ("d",))
    spread = jax.device_put(params["a"]["kernel"], NamedSharding(mesh, PartitionSpec(None, "d")))
    others = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sharded = score({**others, "a": {**others["a"], "kernel": spread}})
    np.testing.assert_allclose(flat(sharded), wanted, rtol=1e-4, atol=1e-6)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, params)
    near = score(low)
    check(near, low)
    assert np.corrcoef(flat(near), wanted)[0, 1] > 0.99


@pytest.mark.parametrize("name", SCORES)
def test_containers(name, container):
    tree = container(net())
    pure = lambda t: {n: {k: jnp.asarray(t[n][k]) for k in ("kernel",)} for n in KERNELS}
    read = lambda t: {n: {k: v[...] for k, v in t[n].items()} for n in KERNELS}
    score = {
        "snip": lambda t: jp.scores.snip(lambda t, x, y: loss(read(t), x, y), t, X, Y),
        "grasp": lambda t: jp.scores.grasp(lambda t, x, y: loss(read(t), x, y), t, X, Y),
        "synflow": lambda t: jp.scores.synflow(lambda t, x: fn(read(t), x), t, X[:1]),
        "obs": lambda t: of_blocks(lambda t, x, y: loss(read(t), x, y), t),
    }[name]
    found = score(tree)
    check(found, tree)
    kernels = {n: {"kernel": found[n]["kernel"][...]} for n in KERNELS}
    np.testing.assert_allclose(flat(kernels), flat(SCORES[name](net())), rtol=1e-4, atol=1e-6)
    assert pure(kernels).keys() == kernels.keys()


@pytest.mark.parametrize("name", SCORES)
def test_where_uses_and_bad_values(name):
    params = net()
    found = SCORES[name](params, where="a/bias")
    assert found["a"]["bias"].shape == (5,)
    assert found["a"]["kernel"].shape == ()
    uses = jp.uses(fn, params, X)
    np.testing.assert_allclose(flat(SCORES[name](params, uses=uses)), flat(SCORES[name](params)))
    with pytest.raises(ValueError, match="nearest"):
        SCORES[name](params, where="a/biases")
    bad = {**params, "a": {**params["a"], "bias": jnp.full(5, jnp.nan)}}
    with pytest.raises(ValueError, match=f"{name}: NaN in the score of leaf 'a/kernel'"):
        SCORES[name](bad)
    with pytest.raises(TypeError, match="'a/kernel' is a QuantizedArray"):
        SCORES[name](jp.quantize_tree(params))


def test_definitions():
    params = net()
    run, w = in_flat(params), flat(params)
    gradient, hessian = jax.grad(run)(w), jax.hessian(run)(w)
    np.testing.assert_allclose(flat(SCORES["snip"](params)), jnp.abs(w * gradient), rtol=1e-4)
    np.testing.assert_allclose(
        flat(SCORES["grasp"](params)), w * (hessian @ gradient), rtol=1e-3, atol=1e-5
    )
    positive = jax.tree.map(jnp.abs, params)
    flow = lambda k: jnp.sum(
        fn({n: {**positive[n], "kernel": k[n]} for n in KERNELS}, jnp.ones((1, 3)))
    )
    kernels = {n: positive[n]["kernel"] for n in KERNELS}
    slopes = jax.grad(flow)(kernels)
    wanted = {n: {"kernel": kernels[n] * slopes[n] / flow(kernels)} for n in KERNELS}
    np.testing.assert_allclose(flat(SCORES["synflow"](params)), flat(wanted), rtol=1e-4)


def test_grasp_keeps_the_flow_of_gradients():
    """To second order, removing a weight changes the squared norm of the gradient by -2 of its score."""
    params = net()
    run, w, eps = in_flat(params), flat(params), 1e-3
    norm = lambda v: jnp.sum(jnp.square(jax.grad(run)(v)))
    scores = np.asarray(flat(SCORES["grasp"](params)))
    for i in np.argsort(-np.abs(scores))[:3]:
        change = (norm(w.at[i].multiply(1 - eps)) - norm(w)) / eps
        assert change == pytest.approx(-2 * scores[i], rel=0.05)


def test_losses_must_be_scalars():
    with pytest.raises(ValueError, match=r"loss_fn: expected a scalar float, got float32\[6, 2\]"):
        jp.scores.snip(lambda p, x: fn(p, x), net(), X)
    with pytest.raises(ValueError, match="got tuple"):
        jp.scores.grasp(lambda p, x, y: (loss(p, x, y), 1), net(), X, Y)
    with pytest.raises(ValueError, match="expected floating results"):
        jp.scores.synflow(lambda p, x: jnp.argmax(fn(p, x)), net(), X)


class Deep(nn.Module):
    depth: int = 60

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(64, kernel_init=nn.initializers.normal(1.0))(x))
        return nn.Dense(3)(x)


def test_synflow_of_deep_networks_does_not_overflow():
    module = Deep()
    params = module.init(jax.random.key(0), jnp.ones((1, 8)))
    score = lambda p: jp.scores.synflow(module.apply, p, jnp.ones((1, 8)))
    assert not jnp.isfinite(module.apply(jax.tree.map(jnp.abs, params), jnp.ones((1, 8)))).all()
    found = jax.jit(score)(params)
    kernels = [s for s in jax.tree.leaves(found) if s.ndim]
    assert len(kernels) == 61
    for scores in kernels:  # what flows through each layer is the same
        assert float(scores.sum()) == pytest.approx(1.0, rel=1e-3)


def test_synflow_takes_norms_and_tokens():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, tokens):
            return self.head(self.norm(self.embed(tokens)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    found = jp.scores.synflow(lambda s, t: nnx.merge(graph, s)(t), state, jnp.array([[1, 2]]))
    assert float(found["embed"]["embedding"][...][1:3].min()) > 0
    assert float(found["embed"]["embedding"][...][3:].max()) == 0
    assert float(found["head"]["kernel"][...].sum()) == pytest.approx(1.0, rel=1e-4)


def squares_by_hand(params):
    run, w = in_flat(params), flat(params)
    each = [jax.grad(run)(w, X[i : i + 1], Y[i : i + 1]) for i in range(len(X))]
    return np.mean(np.square(each), 0)


@pytest.mark.parametrize("microbatch", [1, 4, 100])
def test_fisher_is_of_examples(microbatch):
    params = net()
    batches = [(X[:5], Y[:5]), [X[5:], Y[5:]]]  # of unequal sizes
    found = jp.scores.fisher_diagonal(loss, params, batches, microbatch=microbatch)
    np.testing.assert_allclose(flat(found), squares_by_hand(params), rtol=1e-4)
    assert found["a"]["bias"].shape == ()
    scores = jp.scores.fisher(params, found)
    np.testing.assert_allclose(
        flat(scores), squares_by_hand(params) * np.square(flat(params)) / 2, rtol=1e-4
    )
    with pytest.raises(ValueError, match="'a/bias'.*gradients of these"):
        jp.scores.fisher(params, found, where="a/.*")


def test_accumulated_scores_are_means_over_examples():
    params = net()
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    found = jp.scores.accumulate(lambda p, *b: jp.scores.snip(loss, p, *b), params, batches)
    parts = [flat(jp.scores.snip(loss, params, *b)) for b in batches]
    np.testing.assert_allclose(flat(found), (4 * parts[0] + 2 * parts[1]) / 6, rtol=1e-5)
    check(found, params)
    each = jp.scores.accumulate(
        lambda p, *b: jp.scores.snip(loss, p, *b), params, batches, microbatch=3
    )
    wanted = np.mean(
        [flat(jp.scores.snip(loss, params, X[i : i + 1], Y[i : i + 1])) for i in range(6)], 0
    )
    np.testing.assert_allclose(flat(each), wanted, rtol=1e-4)
    assert jnp.isinf(each["a"]["bias"])


def test_bad_batches():
    params = net()
    with pytest.raises(ValueError, match="at least one"):
        jp.scores.fisher_diagonal(loss, params, [])
    with pytest.raises(ValueError, match=r"leading axis of one size, got \[4, 6\]"):
        jp.scores.fisher_diagonal(loss, params, [(X, Y[:4])])
    with pytest.raises(ValueError, match="microbatch"):
        jp.scores.fisher_diagonal(loss, params, [(X, Y)], microbatch=0)


def test_units_from_scores_that_look_at_data():
    params = net()
    graph = jp.trace(fn, params, X)
    for name in SCORES:
        masks = jp.structure.unit_masks(graph, SCORES[name](params), sparsity=0.4)
        small_fn, small = jp.compact(fn, params, masks, X)
        assert small["a"]["kernel"].shape == (3, 3)
        np.testing.assert_allclose(
            small_fn(small, X), fn(jp.apply_masks(params, masks), X), rtol=1e-4, atol=1e-5
        )
