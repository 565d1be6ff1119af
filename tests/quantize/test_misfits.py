"""Groups that do not divide an axis: padded ones, and what else becomes of such leaves."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def padded(tree, size, axis=None, **settings):
    with pytest.warns(UserWarning, match="does not divide"):
        return jp.quantize_tree(tree, group_size=size, group_axis=axis, otherwise="pad", **settings)


def reference(x, size, axis, bits):
    """Zeros to whole groups, each rounded to its own grid, and cut again."""
    x = np.moveaxis(np.asarray(x), axis, -1)
    n, count = x.shape[-1], -(-x.shape[-1] // size)
    whole = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * size - n)])
    groups = whole.reshape(*x.shape[:-1], count, size)
    scale = np.abs(groups).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    values = np.round(groups / np.where(scale == 0, 1, scale)) * scale
    return np.moveaxis(values.reshape(*x.shape[:-1], count * size)[..., :n], -1, axis)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((10, 6), -2), ((9, 7), -1), ((3, 10, 5), -2), ((2, 11, 2, 3), -3), ((5,), -1), ((1, 7), -1)],
)
def test_padded_groups_are_those_of_padded_arrays(shape, axis):
    x = normal(*shape)
    q = padded({"w": x}, 4, axis, bits=4, where="w")["w"]
    assert q.shape == shape
    assert q.scale.shape[axis] == -(-shape[axis] // 4)
    expected = reference(x, 4, axis, 4)
    np.testing.assert_allclose(q.materialize(), expected, atol=1e-6)
    codes = int(np.prod(q.values.shape))  # no byte for what is not there
    assert q.nbytes == codes + 4 * q.scale.size
    assert codes <= -(-int(np.prod(shape)) // 2) + int(np.prod(shape)) // shape[q.axis]


SETTINGS = {
    "int8": {"bits": 8},
    "int4 asymmetric": {"bits": 4, "symmetric": False},
    "nf4": {"dtype": "nf4"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_slices_maps_loops_and_views(settings):
    x = normal(3, 10, 6)
    q = padded({"w": x}, 4, axis=-2, **settings)["w"]
    dense = np.asarray(q.materialize())
    np.testing.assert_array_equal(q[1].materialize(), dense[1])
    np.testing.assert_array_equal(q.block(1, 2).materialize(), dense[1:])
    np.testing.assert_array_equal(jax.vmap(lambda q: q.materialize())(q), dense)
    np.testing.assert_array_equal(q.reshape(3, 1, 10, 6).materialize()[:, 0], dense)
    matrix = padded({"w": x[0]}, 4, **settings)["w"]
    np.testing.assert_array_equal(matrix.block(4, 6).materialize(), matrix.materialize()[4:])
    with pytest.raises(TypeError, match="block"):
        matrix.block(2, 6)
    run = jp.compressed(lambda p, y: jax.lax.scan(lambda c, w: (c, c @ w), y, p["w"])[1])
    y = run({"w": q}, normal(5, 10, seed=1))
    np.testing.assert_allclose(
        y, jnp.einsum("bi,lio->lbo", normal(5, 10, seed=1), dense), atol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [4, 64])
def test_products_and_look_ups(rows, size):
    x = normal(150, 6)
    q = padded({"w": x}, size, bits=8)["w"]
    dense = q.materialize()
    run = jp.compressed(lambda p, y, i: (y @ p["w"], p["w"][i]), tuning={})
    y = normal(rows, 150, seed=2)
    product, found = run({"w": q}, y, jnp.array([0, 149, 70]))
    assert {c.lowering for c in run.choices}.isdisjoint({"dense"})
    np.testing.assert_allclose(product, y @ dense, atol=2e-3 * float(jnp.std(y @ dense)))
    np.testing.assert_allclose(found, dense[jnp.array([0, 149, 70])], atol=1e-6)


def test_blocks_of_padded_groups(monkeypatch):
    monkeypatch.setattr("jaxprune.runtime._lowerings.BLOCK", 60)
    q = padded({"w": normal(50, 6)}, 8, bits=4)["w"]
    y = normal(5, 50, seed=3)
    found = jax.jit(jp.compressed(lambda p, y: y @ p["w"]))({"w": q}, y)
    np.testing.assert_allclose(found, y @ q.materialize(), atol=1e-4)


def test_default_by_leaf_and_one_warning(tmp_path):
    params = {
        "even": normal(64, 6),
        "long": normal(40, 6),
        "short": normal(8, 6),
        "depthwise": normal(3, 3, 1, 6),
        "tiny": normal(2, 6),
        "heads": {"kernel": normal(40, 2, 5)},
    }

    def fn(p, x):
        y = (
            x @ p["long"]
            + (x[:, :8] @ p["short"])
            + x[:, :2] @ p["tiny"]
            + jnp.tile(x, (1, 2))[:, :64] @ p["even"]
        )
        y = y + jnp.einsum("bd,dhk->bhk", x, p["heads"]["kernel"]).mean()
        image = jnp.ones((1, 4, 4, 6)) * y[0]
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, p["depthwise"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=6
        )

    x = normal(2, 40)
    uses = jp.uses(fn, params, x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tree = jp.quantize_tree(params, bits=4, group_size=32, uses=uses)
    texts = [str(w.message) for w in told if "group_size" in str(w.message)]
    assert len(texts) == 1, told
    for name in (
        "'long' (40, 6)",
        "'short' (8, 6)",
        "'depthwise' (3, 3, 1, 6)",
        "left dense: 'tiny' (2, 6)",
    ):
        assert name in texts[0]
    assert "'even'" not in texts[0]
    assert told[-1].filename == __file__
    assert tree["long"].spec.padded_axis == -2
    assert tree["heads"]["kernel"].spec.padded_axis == -3
    assert tree["short"].spec.group_size is None
    assert tree["depthwise"].spec.group_size is None
    assert tree["tiny"] is params["tiny"]
    jp.export.save(tmp_path / "tree", tree)
    loaded = jp.export.load(tmp_path / "tree")
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, jp.materialize_tree(loaded), jp.materialize_tree(tree))
    assert loaded["long"].spec == tree["long"].spec
    np.testing.assert_allclose(
        jp.compressed(fn)(tree, x), fn(jp.materialize_tree(tree), x), rtol=1e-3, atol=1e-3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.quantize_tree({"even": params["even"]}, group_size=2)


@pytest.mark.parametrize("how", ["channel", "dense"])
def test_otherwise(how):
    params = {"w": normal(40, 6), "v": normal(64, 6)}
    with pytest.warns(UserWarning, match="does not divide 1 leaves"):
        tree = jp.quantize_tree(params, bits=4, group_size=32, otherwise=how)
    assert tree["v"].scale.shape == (2, 6)
    if how == "dense":
        assert tree["w"] is params["w"]
    else:
        plain = jp.quantize_tree(params, bits=4)["w"]
        assert tree["w"].spec == plain.spec
        np.testing.assert_array_equal(tree["w"].materialize(), plain.materialize())
    spec = jp.quantize.Spec(bits=4, group_size=32, otherwise=how)
    with pytest.warns(UserWarning, match="does not divide"):
        ruled = jp.quantize_tree(params, rules=[("w", spec)], where="v")
    jax.tree.map(np.testing.assert_array_equal, ruled["w"], tree["w"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["lsq", "absmax"])
def test_training_on_padded_groups(method, symmetric):
    params = {"w": normal(10, 6)}
    settings = {"bits": 4, "group_size": 4, "symmetric": symmetric}
    with pytest.warns(UserWarning, match="does not divide"):
        tree = jp.qat.prepare(params, method=method, **settings)
    loss = lambda t: jnp.sum(jp.compressed(lambda p, x: x @ p["w"])(t, normal(2, 10)) ** 2)
    grads = jax.grad(loss)(tree)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    small = jp.qat.convert(tree)["w"]
    np.testing.assert_array_equal(small.materialize(), tree["w"].materialize())
    if method == "absmax":
        with pytest.warns(UserWarning, match="does not divide"):
            plain = jp.quantize_tree(params, **settings)["w"]
        np.testing.assert_array_equal(small.materialize(), plain.materialize())
        with pytest.warns(UserWarning, match="does not divide"):
            fake = jp.fake_quantize_tree(params, **settings)["w"]
        np.testing.assert_allclose(fake, plain.materialize(), atol=1e-6)
    else:  # the mean of the last group is that of its two rows
        top = 7 if symmetric else None
        if top:
            first = 2 * jnp.abs(params["w"][8:]).mean(0) / top**0.5
            least = jnp.minimum(first, jnp.abs(params["w"][8:]).max(0) / top)
            np.testing.assert_allclose(small.scale[2], least, rtol=1e-5)


def test_parts_are_padded_too():
    params = {"w": normal(40, 40)}
    factors = jp.factorize_tree(params, rank=10)
    with pytest.warns(UserWarning, match="does not divide"):
        tree = jp.quantize_tree(factors, bits=8, group_size=4)
    difference = jp.materialize_tree(tree)["w"] - jp.materialize_tree(factors)["w"]
    assert float(jnp.abs(difference).max()) < 0.1
    with pytest.warns(UserWarning, match="left dense"):
        tree = jp.quantize_tree(factors, bits=8, group_size=3, otherwise="dense")
    jax.tree.map(np.testing.assert_array_equal, tree["w"], factors["w"])
