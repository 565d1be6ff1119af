"""Clustered leaves: values, bits, gradients, maps, composition and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune._bits import pack_planes, packed_length, plane_fields, unpack_planes, widths_of
from tests.conftest import CONTAINERS
from tests.structure._zoo import normal


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 16, 37])
def test_indices_are_packed_and_come_back(bits, n):
    index = np.random.default_rng(n).integers(0, 2**bits, (3, n)).astype(np.uint8)
    planes = pack_planes(jnp.asarray(index), bits)
    np.testing.assert_array_equal(unpack_planes(planes, bits, n), index)
    assert sum(p.shape[-1] for p in planes) <= -(-n // 8) * bits
    counted = [packed_length(n, bits, i) for i in range(len(widths_of(bits)))]
    assert counted == [p.shape[-1] for p in planes]
    side_by_side = np.concatenate(plane_fields(planes, bits), -1)
    np.testing.assert_array_equal(side_by_side[:, :n], index)


WAYS = {
    "bits": {"bits": 3},
    "clusters": {"clusters": 11},
    "many": {"bits": 6},
    "channels": {"bits": 2, "granularity": "channel"},
    "groups": {"bits": 2, "group_size": 4, "channel_axis": -2},
    "vectors": {"bits": 3, "vector_size": 2},
    "additive": {"bits": 2, "vector_size": 2, "codebooks": 2},
    "groups of vectors": {"bits": 2, "vector_size": 2, "group_size": 4, "channel_axis": -2},
    "a start": {"bits": 3, "init": "kmeans++"},
}


@pytest.mark.parametrize(
    "way",
    [w if w in ("clusters", "groups") else pytest.param(w, marks=pytest.mark.slow) for w in WAYS],
)
def test_contract_of_the_leaf(way):
    x = {"m": normal(8, 12), "stack": normal(4, 8, 12), "k": normal(3, 3, 8, 12)}
    tree = jp.cluster_tree(x, **WAYS[way])
    for name, leaf in tree.items():
        dense = leaf.materialize()
        assert leaf.shape == dense.shape == x[name].shape
        assert leaf.dtype == dense.dtype == x[name].dtype
        assert leaf.nbytes == sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(leaf))
        np.testing.assert_allclose(jax.jit(lambda q: q.materialize())(leaf), dense, atol=1e-6)
        assert jnp.mean((dense - x[name]) ** 2) < 0.7 * jnp.mean(x[name] ** 2)
    if "groups" not in way:
        np.testing.assert_allclose(tree["stack"][1].materialize(), tree["stack"].materialize()[1])
        np.testing.assert_allclose(
            tree["stack"].block(1, 2).materialize(), tree["stack"].materialize()[1:3]
        )
    layers = tree["stack"].stacked()
    if jax.tree.leaves(layers)[0].shape[0] == 4:
        each = jax.vmap(lambda q: q.materialize())(layers)
        np.testing.assert_allclose(each, tree["stack"].materialize(), atol=1e-6)
        looped = jax.lax.scan(lambda c, q: (c, q.materialize()), 0, layers)[1]
        np.testing.assert_allclose(looped, each, atol=1e-6)


def test_number_of_values_and_bytes():
    tree = jp.cluster_tree({"w": normal(64, 64), "k": normal(3, 3, 32, 32)}, bits=4)
    for leaf in tree.values():
        assert len(np.unique(leaf.materialize())) == 16
        assert leaf.nbytes < 1.1 * leaf.size / 2


def test_copies_of_a_codebook_stay_one():
    """A kernel's codebook is copied along its first axis, so that loops may map over it."""
    leaf = jp.cluster_tree({"k": normal(3, 3, 64, 64)}, bits=2)["k"]
    assert leaf.codebook.shape[0] == 3
    grads = jax.grad(lambda q: jnp.sum(q.materialize() ** 3), allow_int=True)(leaf).codebook
    np.testing.assert_allclose(grads[0], grads[2])
    dense, index = leaf.materialize(), leaf.index()
    wanted = [float(jnp.sum(jnp.where(index == i, 3 * dense**2, 0))) for i in range(4)]
    np.testing.assert_allclose(grads[0].ravel(), wanted, rtol=1e-4)
    mapped = jax.vmap(lambda q: q.materialize())(leaf)
    np.testing.assert_allclose(mapped, dense)


@pytest.mark.parametrize("way", ["bits", "many", "channels", "vectors", "additive"])
def test_gradients_sum_into_codewords(way):
    x = normal(8, 12)
    leaf = jp.cluster_tree({"w": x}, **WAYS[way])["w"]
    weight = normal(8, 12, seed=1)
    loss = lambda q: jnp.sum(weight * q.materialize())
    grads = jax.grad(loss, allow_int=True)(leaf).codebook
    book = np.asarray(leaf.codebook)
    for place in np.ndindex(book.shape):
        if sum(place) % 3:
            continue
        bump = np.zeros_like(book)
        bump[place] = 1.0
        moved = jp.share.ClusteredArray(jnp.asarray(book + bump), leaf.indices, *_static(leaf))
        np.testing.assert_allclose(grads[place], loss(moved) - loss(leaf), rtol=1e-3, atol=1e-3)


def _static(leaf):
    return leaf.bits, leaf.length, leaf.dtype, leaf.dim, leaf.zero, leaf.copies


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_and_selection(kind):
    params = CONTAINERS[kind]({"a": normal(8, 8), "b": {"c": normal(8, 8), "bias": normal(8)}})
    tree = jp.cluster_tree(params, bits=2, where="b/c")
    dense = jp.materialize_tree(tree)
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    leaves = jax.tree.leaves(dense)
    assert len(np.unique(leaves[2])) == 4
    np.testing.assert_array_equal(leaves[0], jax.tree.leaves(params)[0])


def test_pruned_weights_stay_zero_in_every_stage():
    params = {"w": normal(32, 32), "k": normal(3, 3, 16, 16)}
    pruned, masks = jp.prune_tree(params, 0.7)
    shared = jp.cluster_tree(pruned, bits=3)
    small = jp.quantize_tree(shared, bits=8)
    for tree in (shared, small):
        dense = jp.materialize_tree(tree)
        for name in params:
            assert (np.asarray(dense[name] == 0) == ~np.asarray(masks[name])).all()
            assert len(np.unique(dense[name])) <= 8
    assert isinstance(small["w"].codebook, jp.QuantizedArray)
    # and under training of the codebook
    tx = jp.optim.trainable(optax.adamw(0.1))
    state = tx.init(shared)
    loss = lambda t: sum(jnp.sum((q.materialize() - 1) ** 2) for q in t.values())
    for _ in range(3):
        grads = jax.grad(loss, allow_int=True)(shared)
        updates, state = tx.update(grads, state, shared)
        shared = optax.apply_updates(shared, updates)
    dense = jp.materialize_tree(shared)
    assert (np.asarray(dense["w"] == 0) == ~np.asarray(masks["w"])).all()
    assert loss(shared) < loss(jp.cluster_tree(pruned, bits=3))


def test_quantized_codebooks_train_and_convert():
    params = {"w": normal(16, 16)}
    tree = jp.qat.prepare(jp.cluster_tree(params, bits=3), bits=4)
    loss = lambda t: jnp.sum((t["w"].materialize() - params["w"]) ** 2)
    grads = jax.grad(loss, allow_int=True)(tree)["w"].codebook
    assert float(jnp.abs(grads.value).max()) > 0
    small = jp.qat.convert(tree)
    np.testing.assert_allclose(small["w"].materialize(), tree["w"].materialize(), atol=1e-6)
    assert isinstance(small["w"].codebook, jp.QuantizedArray)


def test_importance_moves_centroids():
    x = jnp.array([[0.1, 1.1, 10.0, 11.0]])
    weight = {"w": jnp.array([[1.0, 3.0, 1.0, 1.0]])}
    leaf = jp.cluster_tree({"w": x}, bits=1, importance=weight)["w"]
    np.testing.assert_allclose(leaf.codebook.ravel(), [0.85, 10.5], rtol=1e-3)


def test_under_jit_and_in_bfloat16():
    params = {"w": normal(64, 64), "h": normal(64, 64).astype(jnp.bfloat16)}
    eager = jp.materialize_tree(jp.cluster_tree(params, bits=4))
    traced = jax.jit(lambda p: jp.materialize_tree(jp.cluster_tree(p, bits=4)))(params)
    for name, x in params.items():
        error = lambda y, x=x: float(jnp.mean((y.astype(float) - x.astype(float)) ** 2))
        assert error(traced[name]) < 1.1 * error(eager[name]) + 1e-6
        assert traced[name].dtype == eager[name].dtype == x.dtype


def test_sharded_leaves():
    mesh = jax.make_mesh((8,), ("x",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    leaf = jp.cluster_tree({"w": normal(16, 32)}, bits=4)["w"]
    placed = jp.share.ClusteredArray(
        leaf.codebook, tuple(jax.device_put(p, spec) for p in leaf.indices), *_static(leaf)
    )
    fn = jax.jit(lambda q, x: jp.compressed(lambda w, x: x @ w)(q, x))
    x = normal(3, 16)
    np.testing.assert_allclose(fn(placed, x), x @ leaf.materialize(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "1 to 8"),
        ({"clusters": 300}, "2 to 256"),
        ({"vector_size": 5}, "does not divide"),
        ({"group_size": 5}, "does not divide"),
        ({"init": "best"}, "expected one of"),
        ({"importance": {"w": -jnp.ones((8, 8))}}, "negative"),
        ({"importance": {"v": jnp.ones((8, 8))}}, "structure"),
        ({"vector_size": 2, "preserve_zeros": True}, "vector_size=1"),
        ({"where": "x"}, "matches no path"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        jp.cluster_tree({"w": normal(8, 8)}, **change)


def test_bad_weights():
    with pytest.raises(ValueError, match=r"'a/w'.*NaN"):
        jp.cluster_tree({"a": {"w": jnp.full((4, 8), jnp.nan)}}, bits=1)


@pytest.mark.parametrize("way", [{}, {"granularity": "channel"}, {"preserve_zeros": True}])
def test_fewer_values_than_clusters_are_stored_exactly(way):
    w = jnp.tile(jnp.arange(1.0, 4.0), (5, 2))
    params = {"w": w, "zeros": jnp.zeros((4, 8)), "ones": jnp.ones((4, 8)), "some": normal(32, 16)}
    tree = jp.cluster_tree(params, bits=4, **way)
    for name in ("w", "zeros", "ones"):
        np.testing.assert_array_equal(tree[name].materialize(), params[name])
        assert tree[name].bits <= 2
    assert tree["some"].bits == 4


def test_short_last_axes_are_packed_along_another_one():
    for shape in ((128, 1), (4, 128, 1), (256, 2)):
        w = normal(*shape)
        leaf = jp.cluster_tree({"w": w}, bits=2)["w"]
        assert leaf.nbytes - leaf.codebook.nbytes == w.size // 4
        np.testing.assert_array_equal(leaf.materialize().shape, shape)
        small = jp.quantize_tree({"w": w}, bits=2)["w"]
        assert small.nbytes == w.size // 4 + small.scale.nbytes
        wide = jp.quantize_tree({"w": w.swapaxes(-1, -2)}, bits=2, channel_axis=-2)["w"]
        np.testing.assert_array_equal(small.materialize(), wide.materialize().swapaxes(-1, -2))
    assert jp.quantize_tree({"w": normal(128, 1)}, bits=2)["w"].nbytes == 36


def test_optimizer_keeps_weights_on_centroids():
    params = {"w": normal(16, 16), "b": jnp.zeros(16)}
    target, x = normal(16, 16, seed=3), normal(64, 16, seed=4)
    loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - x @ target) ** 2)
    tx = jp.optim.clustered(optax.adam(0.02), bits=3, every=4)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first = loss(params)
    for _ in range(150):
        params, state = step(params, state)
    assert len(np.unique(params["w"])) <= 8
    assert loss(params) < 0.3 * first
    exact = jp.cluster_tree(params, clusters=len(np.unique(params["w"])), where="w")
    np.testing.assert_allclose(exact["w"].materialize(), params["w"], atol=1e-6)


def test_optimizer_keeps_zeros():
    params = jp.prune_tree({"w": normal(16, 16)}, 0.5)[0]
    zeros = np.asarray(params["w"] == 0)
    tx = jp.optim.clustered(optax.sgd(0.1), bits=2, preserve_zeros=True)
    state = tx.init(params)
    for i in range(4):
        updates, state = tx.update({"w": normal(16, 16, seed=i)}, state, params)
        params = optax.apply_updates(params, updates)
    assert (np.asarray(params["w"] == 0) == zeros).all()
    assert len(np.unique(params["w"])) <= 4
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"w": zeros}, state)
