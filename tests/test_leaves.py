"""One contract for every kind of compressed leaf, and for one that is made up here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune._types import CompressedLeaf
from jaxprune.runtime import LeafRule, dense_decoder, register_leaf


@jp.export.register
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ternary(CompressedLeaf):
    """Signs and a scale for each column: what a leaf needs to state, and `block` for products."""

    signs: jax.Array
    scale: jax.Array
    dtype: object = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return self.signs.shape

    def materialize(self):
        return (self.signs * self.scale).astype(self.dtype)

    def block(self, start, size):
        cut = lambda x: x if x.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(x, start, size)
        return Ternary(cut(self.signs), cut(self.scale), self.dtype)


register_leaf(Ternary, LeafRule(dense_decoder))


def ternary(w):
    signs = jnp.sign(w) * (jnp.abs(w) > 0.5)
    scale = jnp.mean(jnp.abs(w), -2, keepdims=True)
    return {"w": Ternary(signs.astype(jnp.int8), scale, w.dtype)}


def pruned(w):
    return jp.sparsify_tree(jp.prune_tree({"w": w}, 0.5, pattern=jp.masks.NM(2, 4))[0])


def aware(w):
    x = jax.random.normal(jax.random.key(5), (32, w.shape[-2])).at[:, 1].mul(30)
    stats = jp.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x])
    return jp.awq({"w": w}, stats, 4, group_size=None)


def tied_layers(w):
    return jp.tie_tree({"w": jnp.concatenate([w[:4]] * 2)}, threshold=0.9, layers="w")


KINDS = {
    "int8": lambda w: jp.quantize_tree({"w": w}),
    "int4 in groups": lambda w: jp.quantize_tree({"w": w}, bits=4, group_size=4),
    "int2 asymmetric": lambda w: jp.quantize_tree({"w": w}, bits=2, symmetric=False),
    "nf4": lambda w: jp.quantize_tree({"w": w}, dtype="nf4"),
    "factors of inputs": aware,
    "float8": lambda w: jp.quantize_tree({"w": w}, dtype="float8_e4m3fn"),
    "clusters": lambda w: jp.cluster_tree({"w": w}, bits=3),
    "vectors": lambda w: jp.cluster_tree({"w": w}, bits=3, vector_size=2),
    "integer codebook": lambda w: jp.quantize_tree(jp.cluster_tree({"w": w}, bits=4)),
    "factors": lambda w: jp.factorize_tree({"w": w}, rank=3),
    "int8 factors": lambda w: jp.quantize_tree(jp.factorize_tree({"w": w}, rank=3)),
    "2:4": pruned,
    "2:4 int8": lambda w: jp.quantize_tree(pruned(w)),
    "tied layers": tied_layers,
    "training": lambda w: jp.qat.prepare({"w": w}, bits=4),
    "training asymmetric": lambda w: jp.qat.prepare({"w": w}, bits=4, symmetric=False),
    "activations": lambda w: jp.quantize_activations(jp.quantize_tree({"w": w}), mode="dynamic"),
    "made up": ternary,
}
# what does not go through products of its own is read dense
WHOLE = ("vectors", "training", "training asymmetric", "tied layers", "2:4")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    w = 0.3 * jax.random.normal(jax.random.key(0), (8, 16, 16))
    return request.param, KINDS[request.param](w)


def layers(p, x):
    return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, p["w"])[0]


def error(wanted, found):
    wanted, found = np.asarray(wanted, np.float32), np.asarray(found, np.float32)
    assert wanted.shape == found.shape
    return np.abs(wanted - found).max() / np.sqrt(np.mean(wanted**2))


X = jax.random.normal(jax.random.key(1), (5, 16))


def test_attributes(kind):
    _, tree = kind
    leaf, dense = tree["w"], tree["w"].materialize()
    assert (leaf.shape, leaf.ndim, leaf.size) == (dense.shape, dense.ndim, dense.size)
    assert leaf.dtype == dense.dtype
    assert leaf.nbytes == jp.nbytes(tree) == sum(x.nbytes for x in jax.tree.leaves(leaf))
    half = leaf.astype(jnp.bfloat16)
    assert half.dtype == half.materialize().dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="float"):
        leaf.astype(jnp.int32)
    again = jax.jit(lambda t: jax.tree.map(lambda x: x, t))(tree)["w"]
    np.testing.assert_array_equal(again.materialize(), dense)
    assert leaf.is_trained in (False, True)
    leaf.check()


def test_views_loops_and_shards(kind):
    name, tree = kind
    dense = jp.materialize_tree(tree)
    cases = {
        "loop": layers,
        "slice": lambda p, x: x @ p["w"][3],
        "one": lambda p, x: x @ p["w"][2:3][0],
    }
    tolerance = 0.1 if name == "activations" else 2e-3
    for what, fn in cases.items():
        assert error(fn(dense, X), jax.jit(jp.compressed(fn))(tree, X)) < tolerance, what
    flat = lambda p, x: jnp.tile(x, 8) @ p["w"].reshape(128, 16)
    assert error(flat(dense, X), jax.jit(jp.compressed(flat))(tree, X)) < tolerance
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = lambda x: ("d",) if x.ndim and x.shape[0] % 8 == 0 else ()
    sharding = lambda x: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec(x)))
    place = lambda x: jax.device_put(x, sharding(x))
    spread = jax.tree.map(place, tree)
    assert error(layers(dense, X), jax.jit(jp.compressed(layers))(spread, X)) < tolerance


def test_maps(kind):
    name, tree = kind
    leaf = tree["w"]
    if callable(getattr(type(leaf), "stacked", None)):
        leaf = leaf.stacked()
    parts = jax.tree.leaves(leaf)
    if any(x.shape[:1] != (8,) for x in parts):
        pytest.skip("parts are shared by all entries of the leading axis")
    dense = tree["w"].materialize()
    found = jax.vmap(lambda q: q.materialize() if hasattr(q, "materialize") else q)(leaf)
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-6)


def test_gradients(kind):
    name, tree = kind
    fn = lambda p, x: jnp.sum(jnp.sin(x @ p["w"][0]))
    found = jax.grad(jp.compressed(fn), allow_int=True)(tree, X)
    wanted = jax.grad(lambda t: fn(jp.materialize_tree(t), X), allow_int=True)(tree)
    moved = 0
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            scale = float(jnp.abs(a).max()) or 1.0
            loose = 0.3 if name == "activations" else 5e-3
            np.testing.assert_allclose(b / scale, a / scale, atol=loose)
            moved += bool((b != 0).any())
    assert moved


@pytest.mark.parametrize("entropy", [False, True])
def test_files(kind, entropy, tmp_path):
    _, tree = kind
    jp.export.save(tmp_path / "x", tree, entropy=entropy)
    found = jp.export.load(tmp_path / "x", like=tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_serialized_functions_take_it(kind):
    pytest.importorskip("flatbuffers")
    _, tree = kind
    fn = lambda t: jax.tree.map(lambda x: x, t)
    exported = jax.export.export(jax.jit(fn))(tree)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    np.testing.assert_array_equal(again.call(tree)["w"].materialize(), tree["w"].materialize())


def test_functions_that_read_programs(kind):
    name, tree = kind
    fn = lambda p, x: x @ p["w"][0]
    graph = jp.trace(fn, tree, X)
    assert graph.shapes == ((8, 16, 16),)
    stats = jp.calibrate(fn, tree, [X])
    assert stats["w"].count.max() == 5
    out, found = jp.distill.capture(fn, tree, X, at={"y": "w"})
    np.testing.assert_allclose(found["y"], out)
    dense = jp.materialize_tree(tree)
    assert jp.quantize.errors(dense, tree)["w"].rms < 1e-6
    assert jp.report(None, dense, tree).bytes_now == tree["w"].nbytes
    masks = {"w": jnp.ones((8, 16, 16), bool)}
    with pytest.raises(TypeError, match=r"'w'.*materialize_tree"):
        jp.apply_masks(tree, masks)
    with pytest.raises(TypeError, match=r"'w'.*before quantizing"):
        jp.compact(fn, tree, masks, X)


def test_products_run_compressed(kind):
    name, tree = kind
    choices = jp.compressed(layers).explain(tree, X).choices
    assert name in WHOLE or "dense" not in {choice.lowering for choice in choices}


def test_rows():
    params = {"w": jax.random.normal(jax.random.key(0), (24, 16))}
    index = jnp.array([[3, 23], [0, 3]])
    fn = lambda p, i: p["w"][i]
    for name, make in KINDS.items():
        if name == "tied layers":
            continue
        tree = make(params["w"])
        found = jax.jit(jp.compressed(fn))(tree, index)
        wanted = fn(jp.materialize_tree(tree), index)
        np.testing.assert_allclose(found, wanted, atol=1e-6, err_msg=name)


def test_ties_are_leaves(tmp_path):
    w = jax.random.normal(jax.random.key(0), (16, 16))
    params = {"a": w, "b": w + 1e-4, "c": {"d": w[::-1]}}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + x @ p["c"]["d"]
    tied = jp.tie_tree(params, threshold=0.99)
    assert jp.share.ties(tied) == {"b": "a"}
    assert jp.nbytes(tied) == 2 * w.nbytes
    resolved = jp.share.resolve_ties(tied)
    assert resolved["b"] is resolved["a"]
    wanted = fn(resolved, X)
    assert error(wanted, jax.jit(jp.compressed(fn))(tied, X)) < 1e-5
    # under another root, and through files
    outer = jp.compressed(lambda p, x: fn(p["params"], x))
    assert error(wanted, outer({"params": tied}, X)) < 1e-5
    jp.export.save(tmp_path / "x", tied)
    assert error(wanted, jp.compressed(fn)(jp.export.load(tmp_path / "x"), X)) < 1e-5
    # what chooses leaves chooses the source, for all places
    for make in (
        jp.quantize_tree,
        lambda t: jp.cluster_tree(t, bits=3),
        lambda t: jp.prune_tree(t, 0.5)[0],
    ):
        small = make(tied)
        assert jp.share.ties(small) == {"b": "a"}
        dense = jp.materialize_tree(small)
        np.testing.assert_array_equal(dense["a"], dense["b"])
        assert error(fn(dense, X), jp.compressed(fn)(small, X)) < 2e-3
    grads = jax.grad(lambda t: jnp.sum(jp.compressed(fn)(t, X)))(tied)
    each = jax.grad(lambda t: jnp.sum(fn(t, X)))(resolved)
    np.testing.assert_allclose(grads["a"], each["a"] + each["b"], rtol=1e-4, atol=1e-4)
    for broken in ({"b": tied["b"]}, {"b": tied["b"], "aa": w}):
        with pytest.raises(ValueError, match=r"'b' is tied to 'a'.*whole"):
            jp.compressed(lambda p, x: x @ p["b"])(broken, X)
    with pytest.raises(ValueError, match="resolve"):
        tied["b"].materialize()


def test_every_kind_is_here():
    from jaxprune._leaves import NODES

    w = jnp.ones((8, 16, 16)) * jnp.arange(16.0)[:, None]
    made = {type(make(w)["w"]) for make in KINDS.values()}
    leaves = {n.cls for n in NODES.values() if issubclass(n.cls, CompressedLeaf)}
    other = {"PackedMask", "TuckerArray", "TiedArray"}  # masks; kernels; ties, which are above
    assert {cls.__name__ for cls in leaves - made} <= other
