"""Pruned leaves without their zeros: storage, products, files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from jaxprune.runtime._rules import Kind
from jaxprune.runtime._tuning import DEFAULTS
from tests.structure._zoo import build, normal


def pruned(shape, n, m, axis, seed=0):
    params = {"w": normal(*shape, seed=seed)}
    return jp.prune_tree(params, 1 - n / m, pattern=jp.masks.NM(n, m, axis), where=".*")


@pytest.mark.parametrize(
    ("shape", "n", "m", "axis"),
    [
        ((8, 4), 2, 4, -2),
        ((10, 6), 2, 4, 0),
        ((6, 11), 2, 4, -1),
        ((3, 16, 5), 1, 4, -2),
        ((3, 3, 12, 7), 2, 4, 2),
        ((20, 3), 4, 8, -2),
        ((33, 3), 3, 5, 0),
        ((40, 2), 5, 16, -2),
        ((70, 2), 9, 32, -2),
        ((9, 3), 1, 2, -2),
    ],
)
def test_what_is_stored_comes_back(shape, n, m, axis):
    params, masks = pruned(shape, n, m, axis)
    for given in (None, masks):
        leaf = jp.sparsify_tree(params, n=n, m=m, axis=axis, masks=given)["w"]
        np.testing.assert_array_equal(leaf.materialize(), params["w"])
        assert leaf.shape == shape
        assert leaf.nbytes == sum(x.nbytes for x in jax.tree.leaves(leaf))
        groups = -(-shape[axis] // m)
        assert leaf.values.shape[axis] == n * groups
    assert jp.nbytes({"w": leaf}) == leaf.nbytes


def test_masks_keep_the_place_of_weights_that_are_zero():
    w = jnp.array([[0.0], [5.0], [0.0], [0.0]])
    masks = {"w": jnp.array([[True], [True], [False], [False]])}
    leaf = jp.sparsify_tree({"w": w}, masks=masks)["w"]
    assert leaf.flags.ravel().tolist() == [0b0011]
    moved = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, leaf)
    assert moved.materialize().ravel().tolist() == [1.0, 6.0, 0.0, 0.0]


def test_bytes_are_what_they_should_be():
    leaf = jp.sparsify_tree(pruned((256, 64), 2, 4, -2)[0])["w"]
    dense = 256 * 64 * 4
    assert leaf.nbytes / dense == 0.5 + 1 / 32
    codes = jp.quantize_tree({"w": leaf}, bits=8)["w"]
    assert codes.nbytes / dense == pytest.approx((0.5 + 1 / 8) / 4, abs=0.01)


LAYOUTS = {
    "k,n": ((24, 20), "rk,kn->rn", -2),
    "n,k": ((20, 24), "rk,nk->rn", -1),
    "free axis": ((24, 20), "rk,kn->rn", -1),
    "heads": ((24, 4, 8), "rd,dhk->rhk", -3),
    "merged heads": ((4, 8, 12), "rhk,hkd->rd", -2),
    "experts": ((4, 24, 20), "rek,ekn->ren", -2),
    "ragged": ((26, 20), "rk,kn->rn", -2),
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in ("k,n", "n,k", "ragged") else pytest.mark.slow)
        for name in LAYOUTS
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        "float",
        "int8",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("int4", "asymmetric", "bfloat16")),
    ],
)
def test_products(layout, kind):
    shape, equation, axis = LAYOUTS[layout]
    params, _ = pruned(shape, 2, 4, axis)
    if kind == "bfloat16":
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tree = jp.sparsify_tree(params, axis=axis)
    if kind not in ("float", "bfloat16"):
        settings = {"int8": {"bits": 8}, "int4": {"bits": 4}}.get(kind, {"symmetric": False})
        tree = jp.quantize_tree(tree, **settings)
        zeros = np.asarray(params["w"]) == 0
        assert (np.asarray(tree["w"].materialize())[zeros] == 0).all()
    dense = jp.materialize_tree(tree)
    left, right = equation.split("->")[0].split(",")
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])
    for rows in (1, 40):
        sizes = dict(zip(right, shape, strict=True)) | {"r": rows}
        x = normal(*(sizes[c] for c in left), seed=1).astype(params["w"].dtype)
        run = jp.compressed(fn)
        found = jax.jit(run)(tree, x)
        wanted = np.asarray(fn(dense, x), np.float64)
        error = np.abs(wanted - np.asarray(found, np.float64)).max() / np.abs(wanted).max()
        assert error < (2e-2 if kind == "bfloat16" else 5e-4)
        # scales that belong to places along the groups have no codes to multiply
        codes = kind in ("int8", "int4") and layout != "heads"
        if not codes:
            thresholds = DEFAULTS["cpu"][Kind.NM_VALUE]
            wanted = next(name for most, name in thresholds if rows <= most or most < 0)
            assert run.choices[0].lowering == wanted
        else:
            assert run.choices[0].lowering != "dense"


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in (
                "flatten_cnn",
                "residual",
                "transformer",
                "scanned_layers",
                "mixture_of_experts",
            )
        ),
    ],
)
def test_networks_on_sparse_leaves(name):
    fn, params, x = build(name)
    params, _ = jp.prune_tree(params, 0.5, pattern=jp.masks.NM(2, 4))
    tree = jp.sparsify_tree(params)
    wanted, found = fn(params, x), jax.jit(jp.compressed(fn))(tree, x)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_look_ups_and_convolutions():
    tree = jp.sparsify_tree(pruned((12, 16), 2, 4, -1)[0], axis=-1)
    index = jnp.array([[0, 5], [11, 3]])
    fn = lambda p, i: jnp.take(p["w"], i, axis=0)
    for each in (tree, jp.quantize_tree(tree, bits=8)):
        run = jp.compressed(fn)
        np.testing.assert_allclose(
            run(each, index), fn(jp.materialize_tree(each), index), rtol=1e-6
        )
        assert run.choices[0].lowering == "rows"
    kernel = jp.sparsify_tree(pruned((3, 3, 8, 6), 2, 4, -2)[0])
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = normal(2, 6, 6, 8)
    wanted = conv(jp.materialize_tree(kernel), x)
    np.testing.assert_allclose(jp.compressed(conv)(kernel, x), wanted, rtol=1e-4, atol=1e-5)
    found = jp.compressed(conv, activations="int8")(jp.quantize_tree(kernel, bits=8), x)
    np.testing.assert_allclose(found, wanted, atol=0.05 * float(jnp.abs(wanted).max()))


def test_scan_vmap_shards_and_training():
    params, _ = pruned((5, 16, 16), 2, 4, -2)
    params = jax.tree.map(lambda w: w / 3, params)  # layers that keep the size of their inputs
    tree = jp.sparsify_tree(params)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    x = normal(3, 16)
    np.testing.assert_allclose(
        jax.jit(jp.compressed(fn))(tree, x), fn(params, x), rtol=1e-3, atol=1e-4
    )
    each = jax.vmap(lambda leaf: leaf.materialize())(tree["w"])
    np.testing.assert_array_equal(each, params["w"])
    mesh = jax.make_mesh((len(jax.devices()),), ("d",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "d"))
    spread = jax.tree.map(lambda y: jax.device_put(y, place), tree)
    np.testing.assert_allclose(
        jax.jit(jp.compressed(fn))(spread, x), fn(params, x), rtol=1e-3, atol=1e-4
    )
    tx = jp.optim.trainable(optax.sgd(0.1))
    loss = lambda t: jnp.sum(fn(jp.materialize_tree(t), x) ** 2)
    updates, _ = tx.update(jax.grad(loss, allow_int=True)(tree), tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    assert float(loss(after)) < float(loss(tree))
    assert (np.asarray(after["w"].materialize())[np.asarray(params["w"]) == 0] == 0).all()


def test_files(tmp_path):
    tree = jp.sparsify_tree(pruned((16, 8), 2, 4, -2)[0])
    for name, each in (("float", tree), ("codes", jp.quantize_tree(tree, bits=4))):
        jp.export.save(tmp_path / name, each)
        back = jp.export.load(tmp_path / name)
        np.testing.assert_array_equal(back["w"].materialize(), each["w"].materialize())
        assert jax.tree.structure(back) == jax.tree.structure(each)


def test_leaves_without_the_pattern_stay_unless_they_are_named():
    params = {**pruned((8, 4), 2, 4, -2)[0], "dense": normal(8, 4), "b": jnp.ones(4)}
    tree = jp.sparsify_tree(params)
    assert isinstance(tree["w"], jp.SparseArray)
    assert tree["dense"] is params["dense"]
    with pytest.raises(ValueError, match=r"leaf 'dense' has 4 of 4.*prune it with"):
        jp.sparsify_tree(params, where="dense")
    with pytest.raises(ValueError, match="leaf 'b'.*no axis -2"):
        jp.sparsify_tree(params, where="b")
    with pytest.raises(ValueError, match=r"no leaf has at most 1.*NM\(1, 4, 'contracted'\)"):
        jp.sparsify_tree(params, n=1)
    with pytest.raises(ValueError, match="n <= m <= 32"):
        jp.sparsify_tree(params, n=5, m=4)
    with pytest.raises(ValueError, match="masks"):
        jp.sparsify_tree(params, masks={"w": True})
