"""Every format and granularity, against NumPy, at the edges, and under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune._bits import pack, unpack
from jaxprune.quantize import Spec
from jaxprune.quantize._spec import NF4_LEVELS

FORMATS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int2": {"bits": 2},
    "int8 asymmetric": {"bits": 8, "symmetric": False},
    "int4 asymmetric": {"bits": 4, "symmetric": False},
    "int2 asymmetric": {"bits": 2, "symmetric": False},
    "float8": {"dtype": "float8_e4m3fn"},
    "nf4": {"dtype": "nf4"},
    "int4 groups": {"bits": 4, "group_size": 8},
    "int8 asymmetric groups": {"bits": 8, "symmetric": False, "group_size": 4},
    "nf4 groups": {"dtype": "nf4", "group_size": 8},
    "int8 tensor": {"bits": 8, "granularity": "tensor"},
    "float8 tensor": {"dtype": "float8_e4m3fn", "granularity": "tensor"},
}
WIDTH = {"int8": 8, "int4": 4, "int2": 2, "float8": 8, "nf4": 4}


def matrix(rows=32, columns=12, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, columns))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(name, dtype):
    w = matrix().astype(dtype)
    q = jp.quantize_tree({"w": w}, **FORMATS[name])["w"]
    out = q.materialize()
    assert out.shape == q.shape == w.shape
    assert out.dtype == q.dtype == w.dtype
    x, y = np.asarray(w, np.float32), np.asarray(out, np.float32)
    scale = np.asarray(q.scale)
    if q.spec.group_size:
        scale = np.repeat(scale, q.spec.group_size, axis=0)
    gap = {"float8": 32.0, "nf4": 0.16}.get(name.split()[0], 0.5)  # largest half step, in scales
    rounding = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    assert (np.abs(x - y) <= gap * scale + rounding * np.abs(x).max()).all()
    width = WIDTH[name.split()[0]]
    values = 32 * 12 * width // 8
    zero = 0 if q.zero_point is None else q.zero_point.size
    assert q.nbytes == values + 4 * q.scale.size + zero
    again = jp.quantize_tree({"w": out.astype(jnp.float32)}, **FORMATS[name])["w"]
    np.testing.assert_allclose(again.materialize(), y, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_against_numpy(bits, symmetric):
    w = np.asarray(matrix())
    q = jp.quantize_tree({"w": jnp.asarray(w)}, bits, symmetric=symmetric)["w"]
    top = 2 ** (bits - 1) - 1
    if symmetric:
        scale, zero, least = np.abs(w).max(0) / top, 0.0, -top
    else:
        low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
        scale = (high - low) / (2**bits - 1)
        zero, least = np.round(-top - 1 - low / scale), -top - 1
    levels = np.clip(np.round(w / scale + zero), least, top)
    np.testing.assert_allclose(np.asarray(q.scale)[0], scale, rtol=1e-6)
    got = np.asarray(q.levels())
    assert (np.abs(got - levels) <= 1).all()  # a ratio within rounding of a half may go either way
    assert (got == levels).mean() > 0.99
    np.testing.assert_allclose(q.materialize(), (got - zero) * scale, rtol=1e-5, atol=1e-6)


def test_nf4_against_nearest_level():
    w = np.asarray(matrix())
    q = jp.quantize_tree({"w": jnp.asarray(w)}, dtype="nf4")["w"]
    ratio = w / np.abs(w).max(0)
    nearest = NF4_LEVELS[np.abs(ratio[..., None] - NF4_LEVELS).argmin(-1)]
    np.testing.assert_allclose(q.materialize(), nearest * np.abs(w).max(0), rtol=1e-6)


def test_float8_against_ml_dtypes():
    import ml_dtypes

    w = np.asarray(matrix())
    scale = np.abs(w).max(0) / 448
    want = (w / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    got = jp.quantize_tree({"w": jnp.asarray(w)}, dtype=jnp.float8_e4m3fn)["w"].materialize()
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_stays_zero(name):
    w = matrix() * (matrix(seed=1) > 0.3) + 0.0
    out = jp.dequantize_tree(jp.quantize_tree({"w": w + 0.0}, **FORMATS[name]))["w"]
    assert bool(jnp.all(out[w == 0] == 0))
    shifted = jnp.where(w == 0, 0, jnp.abs(w) + 5)  # all on one side of zero
    out = jp.dequantize_tree(jp.quantize_tree({"w": shifted}, **FORMATS[name]))["w"]
    assert bool(jnp.all(out[w == 0] == 0))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "w",
    [
        jnp.zeros((8, 4)),
        jnp.full((8, 4), 3.0),
        jnp.full((8, 4), -3.0),
        jnp.full((8, 4), 3e38),
        jnp.array([[3e38, -3e38]] * 8),
        jnp.full((8, 4), 1e-38),
        jnp.zeros((0, 4)),
        jnp.zeros((8, 0)),
    ],
    ids=["zero", "constant", "negative", "huge", "wide", "tiny", "no rows", "no columns"],
)
def test_edges(name, w):
    out = jp.dequantize_tree(jp.quantize_tree({"w": w}, **FORMATS[name]))["w"]
    assert out.shape == w.shape
    assert bool(jnp.all(jnp.isfinite(out)))
    if w.size and name.startswith(("int8", "int4", "float8", "nf4")):
        np.testing.assert_allclose(out, w, rtol=0.15, atol=2e-38)


def test_vectors_and_scalars():
    for w in (jnp.array([1.0, -2.0, 0.5]), jnp.array(3.0)):
        for kw in (FORMATS["int8"], FORMATS["int4"], FORMATS["nf4"]):
            q = jp.quantize_tree(w, where=lambda *_: True, **kw)
            assert q.shape == w.shape
            np.testing.assert_allclose(q.materialize(), w, atol=0.3)


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=20), st.sampled_from([1, 2, 4]))
@settings(max_examples=50, deadline=None)
def test_bit_packing(values, width):
    x = jnp.asarray(values, jnp.int8)
    packed = pack(x, width)
    assert packed.shape == (-(-len(values) * width // 8),)
    unsigned = np.asarray(values) & (2**width - 1)
    np.testing.assert_array_equal(unpack(packed, width, len(values), signed=False), unsigned)
    signed = np.where(unsigned >= 2 ** (width - 1), unsigned - 2**width, unsigned)
    np.testing.assert_array_equal(unpack(packed, width, len(values), signed=True), signed)


@pytest.mark.parametrize("name", FORMATS)
def test_maps_over_leading_axes(name):
    w = jax.random.normal(jax.random.key(0), (5, 16, 6))
    q = jp.quantize_tree(w, **FORMATS[name])
    dense = q.materialize()
    np.testing.assert_array_equal(jax.vmap(lambda x: x.materialize())(q), dense)
    _, rows = jax.lax.scan(lambda c, x: (c, x.materialize()), 0, q)
    np.testing.assert_array_equal(rows, dense)
    np.testing.assert_array_equal(q[3].materialize(), dense[3])
    np.testing.assert_array_equal(q[1:4].materialize(), dense[1:4])
    np.testing.assert_array_equal(jax.jit(lambda x: x.materialize())(q), dense)


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (2, 3, 3, 4, 8)])
def test_kernels_map_over_their_first_axis(shape):
    q = jp.quantize_tree(jax.random.normal(jax.random.key(0), shape), bits=4)
    np.testing.assert_array_equal(jax.vmap(lambda x: x.materialize())(q), q.materialize())


def test_sharding_is_kept():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    w = jax.device_put(jax.random.normal(jax.random.key(0), (32, 16)), sharding)
    for kw in (FORMATS["int8"], FORMATS["int4"]):
        q = jp.quantize_tree(w, **kw)
        assert q.values.sharding.is_equivalent_to(sharding, 2)
        alone = jp.quantize_tree(jnp.asarray(jax.device_get(w)), **kw)
        np.testing.assert_array_equal(q.materialize(), alone.materialize())


def test_trees_and_rules(params, container):
    tree = container(params)
    q = jp.quantize_tree(
        tree, rules=[("conv/.*", None), (".*/kernel", Spec(bits=4)), ("dense/bias", 8)]
    )
    kinds = [
        getattr(getattr(x, "spec", None), "format", None)
        for x in jax.tree.leaves(q, is_leaf=lambda x: isinstance(x, jp.QuantizedArray))
    ]
    assert kinds == [None, None, "int8", "int4", "int8"]
    back = jp.dequantize_tree(q)
    assert jax.tree.structure(back) == jax.tree.structure(tree)


def test_unused_rules_are_reported(params):
    with pytest.warns(UserWarning, match="'dens/.*' matches no path"):
        jp.quantize_tree(params, rules=[("dens/.*", 4)])
    with pytest.warns(UserWarning, match="earlier rules"):
        jp.quantize_tree(params, rules=[("dense/.*", 4), ("dense/kernel", 8)])


@pytest.mark.parametrize("name", FORMATS)
def test_fake_equals_real(name):
    w = matrix()
    real = jp.dequantize_tree(jp.quantize_tree({"w": w}, **FORMATS[name]))["w"]
    fake = jp.fake_quantize_tree({"w": w}, **FORMATS[name])["w"]
    np.testing.assert_array_equal(fake, real)
    np.testing.assert_array_equal(jp.fake_quantize(w, **FORMATS[name]), real)
    np.testing.assert_allclose(
        jax.jit(lambda x: jp.fake_quantize(x, **FORMATS[name]))(w), real, rtol=1e-5
    )
    grad = jax.grad(lambda x: jnp.sum(jnp.cos(w) * jp.fake_quantize(x, **FORMATS[name])))(w)
    np.testing.assert_allclose(grad, jnp.cos(w), rtol=1e-6)


def test_fake_gradient_is_clipped():
    x = jnp.array([-3.0, -1.76, -1.75, 0.1, 1.75, 1.76, 3.0])
    f = lambda x: jp.fake_quantize(x, bits=4, scale=0.25).sum()
    assert jax.grad(f)(x).tolist() == [0, 0, 1, 1, 1, 0, 0]
    tangent = jax.jvp(lambda x: jp.fake_quantize(x, bits=4, scale=0.25), (x,), (jnp.ones_like(x),))[
        1
    ]
    assert tangent.tolist() == [0, 0, 1, 1, 1, 0, 0]
    g = lambda x: jp.fake_quantize(x, bits=4, scale=0.25, symmetric=False, zero_point=-8.0).sum()
    assert jax.grad(g)(x).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert jp.fake_quantize(x, bits=4, scale=0.25, symmetric=False, zero_point=-8.0).min() == 0


def test_jit_vmap_and_int_inputs():
    w = jax.random.normal(jax.random.key(0), (4, 8, 6))
    rows = jax.vmap(lambda x: jp.fake_quantize(x, bits=4))(w)
    np.testing.assert_allclose(rows[2], jp.fake_quantize(w[2], bits=4), rtol=1e-6)
    q = jax.jit(lambda x: jp.quantize_tree(x, bits=4))(w[0])
    np.testing.assert_array_equal(q.values, jp.quantize_tree(w[0], bits=4).values)
    with pytest.raises(TypeError, match="floats"):
        jp.fake_quantize(jnp.arange(3))


def test_bad_input(params):
    with pytest.raises(ValueError, match="bits"):
        jp.quantize_tree(params, bits=3)
    with pytest.raises(ValueError, match="dtype"):
        jp.quantize_tree(params, dtype="int3")
    with pytest.raises(ValueError, match=r"'conv/kernel'.*use 2"):
        jp.quantize_tree(params, group_size=3, otherwise="error")
    with pytest.raises(ValueError, match="otherwise: needs group_size"):
        jp.quantize_tree(params, otherwise="pad")
    with pytest.raises(ValueError, match="otherwise: expected one of"):
        jp.quantize_tree(params, group_size=3, otherwise="cut")
    with pytest.raises(ValueError, match="zero point"):
        jp.quantize_tree(params, dtype="nf4", symmetric=False)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        broken = {**params, "embed": params["embed"].at[1, 2].set(bad)}
        for kw in FORMATS.values():
            if "group_size" not in kw:
                with pytest.raises(ValueError, match="'embed'"):
                    jp.quantize_tree(broken, **kw)
    with pytest.raises(TypeError, match="rules"):
        jp.quantize_tree(params, rules=["dense/.*"])
    with pytest.raises(ValueError, match="group_size"):
        jax.jit(lambda p: jp.quantize_tree(p, group_size=3, otherwise="error"))(params)


def test_channel_axis_and_full_range():
    x = np.asarray(jax.random.normal(jax.random.key(3), (6, 4))) * np.arange(1, 7)[:, None]
    tree = jp.quantize_tree({"w": jnp.asarray(x)}, channel_axis=-2)
    assert tree["w"].scale.shape == (6, 1)
    np.testing.assert_allclose(tree["w"].scale[:, 0], np.abs(x).max(1) / 127, rtol=1e-6)
    assert np.abs(tree["w"].materialize() - x).max() <= np.abs(x).max() / 254 + 1e-6
    stacked = jp.quantize_tree({"w": jnp.asarray(x.reshape(2, 3, 4))}, bits=4, channel_axis=-2)
    assert stacked["w"].scale.shape == (2, 3, 1)
    full = jp.quantize_tree(
        {"w": jnp.asarray(x)}, rules=[("w", jp.quantize.Spec(bits=2, full_range=True))]
    )["w"]
    assert set(np.unique(full.levels()).tolist()) <= {-2, -1, 0, 1}
    np.testing.assert_allclose(full.scale[0], np.abs(x).max(0) / 1.5, rtol=1e-6)
    with pytest.raises(ValueError, match="channel_axis"):
        jp.quantize.Spec(channel_axis=0)
    with pytest.raises(ValueError, match="group_size"):
        jp.quantize.Spec(channel_axis=-2, group_size=2)


def test_views_and_errors():
    x = jax.random.normal(jax.random.key(4), (4, 6, 8))
    for kind in ({"bits": 8}, {"bits": 4}, {"dtype": "nf4"}, {"bits": 8, "group_size": 3}):
        q = jp.quantize_tree({"w": x}, **kind)["w"]
        dense = q.materialize()
        np.testing.assert_array_equal(q.block(1, 2).materialize(), dense[1:3])
        np.testing.assert_array_equal(q[2].materialize(), dense[2])
        np.testing.assert_array_equal(q.reshape(4, 1, 6, 8).materialize()[:, 0], dense)
        if "group_size" not in kind:
            np.testing.assert_array_equal(q.reshape(24, 8).materialize(), dense.reshape(24, 8))
        assert q.astype(jnp.bfloat16).materialize().dtype == jnp.bfloat16
        with pytest.raises(TypeError, match="reshape"):
            q.reshape(32, 6)
        vector = jp.quantize_tree({"v": x[0, 0]}, where="v", group_size=4)["v"]
        with pytest.raises(TypeError, match="reshape"):
            vector.reshape(1, 1, 8)
        found = jp.quantize.errors({"w": x}, {"w": q})["w"]
        difference = np.asarray(dense - x)
        np.testing.assert_allclose(found.rms, np.sqrt((difference**2).mean()), rtol=1e-4)
        np.testing.assert_allclose(found.largest, np.abs(difference).max(), rtol=1e-4)
        ratio = np.linalg.norm(difference) / np.linalg.norm(x)
        np.testing.assert_allclose(found.relative, ratio, rtol=1e-4)
        np.testing.assert_allclose(found.sqnr_db, -20 * np.log10(ratio), rtol=1e-3)
    with pytest.raises(ValueError, match="another tree"):
        jp.quantize.errors({"w": x}, {"v": x})
