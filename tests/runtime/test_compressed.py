"""A function on compressed leaves gives what it gives on their dense forms."""

import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from tests.structure._zoo import TOKENS, ZOO, build, normal, randomized

KINDS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int2": {"bits": 2},
    "asymmetric": {"bits": 8, "symmetric": False},
    "int4_asymmetric": {"bits": 4, "symmetric": False},
    "nf4": {"dtype": "nf4"},
    "float8": {"dtype": "float8_e4m3fn"},
    "tensor": {"rules": [(".*", jp.quantize.Spec(bits=8, granularity="tensor"))]},
}
FEW = ["mlp", "rms_norm_and_tied_embedding", "scanned_layers", "post_norm_encoder", "flatten_cnn"]


def error(expected, found):
    """The largest difference, relative to the largest value."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)))
    return worst


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
@pytest.mark.parametrize("kind", ["int8", "int4_asymmetric", "nf4"])
def test_zoo(name, kind):
    fn, params, x = build(name)
    tree = jp.quantize_tree(params, **KINDS[kind])
    run = jp.compressed(fn)
    tolerance = 0.02 if name == "bfloat16_mlp" else 2e-3
    assert error(jax.jit(fn)(jp.dequantize_tree(tree), x), jax.jit(run)(tree, x)) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["k,n", "n,k", "left"])
@pytest.mark.parametrize("rows", [1, 7])
def test_products(kind, layout, rows):
    shape = (33, 18) if layout != "n,k" else (18, 33)
    params = {"w": normal(*shape)}
    x = normal(rows, 33, seed=1) * jnp.linspace(0.1, 10, rows)[:, None]
    fn = {
        "k,n": lambda p, x: x @ p["w"],
        "n,k": lambda p, x: x @ p["w"].T,
        "left": lambda p, x: p["w"].T @ x.T,
    }[layout]
    tree = jp.quantize_tree(params, **KINDS[kind])
    run = jp.compressed(fn)
    expected = fn(jp.dequantize_tree(tree), x)
    found = jax.jit(run)(tree, x)
    assert error(expected, found) < 2e-4
    for wanted, row in zip(
        *((y.T if layout == "left" else y) for y in (expected, found)), strict=True
    ):
        assert error(wanted, row) < 2e-4  # every row keeps its own precision
    (choice,) = {c.lowering for c in run.choices}
    # scales of the contracted indices do not factor out of nf4 levels
    levels = "blocked" if layout == "n,k" else "blocked_int8_split"
    wanted = {"nf4": levels, "float8": "blocked"}.get(kind, "int8_split")
    single = rows == 1 and jax.__version_info__ >= (0, 11)
    assert choice == ("blocked" if single else wanted)


def test_zero_huge_and_tiny_activations():
    tree = jp.quantize_tree({"w": normal(16, 8)}, bits=8)
    fn = lambda p, x: x @ p["w"]
    run = jp.compressed(fn)
    assert not run(tree, jnp.zeros((3, 16))).any()
    for scale in (1e-20, 1e20):
        x = scale * normal(3, 16)
        assert error(fn(jp.dequantize_tree(tree), x) / scale, run(tree, x) / scale) < 2e-4


@pytest.mark.parametrize("kind", ["int8", "int4", "asymmetric"])
def test_8_bit_activations(kind):
    params = {"w": normal(256, 64)}
    tree, x = jp.quantize_tree(params, **KINDS[kind]), normal(32, 256, seed=1)
    fn = lambda p, x: x @ p["w"]
    run = jp.compressed(fn, activations="int8")
    expected = fn(jp.dequantize_tree(tree), x)
    found = run(tree, x)
    assert [choice.lowering for choice in run.choices] == ["integer"]
    assert 1e-4 < error(expected, found) < 0.02
    scale = np.abs(x).max(1, keepdims=True) / 127
    rounded = np.round(np.asarray(x) / scale) * scale
    np.testing.assert_allclose(fn(jp.dequantize_tree(tree), rounded), found, rtol=1e-3, atol=1e-3)


def test_embeddings_are_looked_up_compressed():
    params = {"e": normal(30, 16), "w": normal(16, 4)}
    fn = lambda p, t: p["e"][t].mean(1) @ p["w"]
    for kind in ("int8", "int4", "asymmetric", "nf4"):
        tree = jp.quantize_tree(params, **KINDS[kind])
        run = jp.compressed(fn)
        assert error(fn(jp.dequantize_tree(tree), TOKENS), run(tree, TOKENS)) < 2e-4
        assert run.choices[0].lowering == "rows"
    tree = jp.quantize_tree(params, bits=4, group_size=10, where="e")
    assert error(fn(jp.dequantize_tree(tree), TOKENS), jp.compressed(fn)(tree, TOKENS)) < 2e-4
    outside = jnp.array([[1, 40, -1]])
    wanted, found = (
        f(t, outside) for f, t in ((fn, jp.dequantize_tree(tree)), (jp.compressed(fn), tree))
    )
    np.testing.assert_array_equal(np.isnan(wanted), np.isnan(found))


def test_stacked_layers_stay_compressed_in_scan():
    def fn(p, x):
        return jax.lax.scan(lambda y, w: (y + jnp.tanh(y @ w["w"]), None), x, p)[0]

    tree = jp.quantize_tree({"w": 0.3 * normal(4, 16, 16)}, bits=4)
    x = normal(6, 16, seed=1)
    run = jp.compressed(fn)
    assert error(fn(jp.dequantize_tree(tree), x), jax.jit(run)(tree, x)) < 1e-3
    assert [choice.lowering for choice in run.choices] == ["int8_split"]


def test_jit_vmap_grad_and_remat():
    fn = lambda p, x: jnp.tanh(jax.checkpoint(lambda v: v @ p["w"])(x)) @ p["v"]
    tree = jp.quantize_tree({"w": normal(16, 16), "v": normal(16, 4)}, bits=8)
    dense, run = jp.dequantize_tree(tree), jp.compressed(fn)
    x = normal(5, 3, 16, seed=1)
    assert error(fn(dense, x), jax.jit(run)(tree, x)) < 1e-3
    assert error(fn(dense, x), jax.vmap(run, (None, 0))(tree, x)) < 1e-3
    loss = lambda f, p: lambda v: jnp.sum(jnp.sin(f(p, v)))
    for activations, tolerance in ((None, 1e-3), ("int8", 0.1)):
        coarse = jp.compressed(fn, activations=activations)
        found = jax.jit(jax.grad(loss(coarse, tree)))(x)
        assert error(jax.grad(loss(fn, dense))(x), found) < tolerance
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(normal(16, 16), jax.sharding.NamedSharding(mesh, spec("d")))
    assert error(fn(dense, spread), jax.jit(run)(tree, spread)) < 1e-3


def test_linen_module_and_masks():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.Dense(32)(x)))

    x = normal(6, 16)
    params = randomized(Net().init(jax.random.key(0), x))
    pruned, _ = jp.prune_tree(params, 0.5)
    tree = jp.quantize_tree(pruned, bits=8)
    run = jp.compressed(Net().apply)
    assert error(Net().apply(jp.dequantize_tree(tree), x), run(tree, x)) < 1e-3
    assert "int8_split" in list(run.table.columns[3].cells)


def test_dense_leaves_run_as_they_are():
    fn, params, x = build("mlp")
    run = jp.compressed(fn)
    np.testing.assert_array_equal(jax.jit(fn)(params, x), jax.jit(run)(params, x))
    assert run.choices == ()


def test_explain_and_warning():
    tree = jp.quantize_tree({"w": normal(8, 4)}, bits=8)
    fn = lambda p, x: x * jnp.sum(jnp.abs(p["w"]))
    found = jp.compressed(fn).explain(tree, jnp.ones(2))
    assert [(c.primitive, c.lowering, c.dense_bytes) for c in found.choices] == [
        ("abs", "dense", 128)
    ]
    assert found.table.row_count == 1
    shapes = jax.eval_shape(lambda: (tree, jnp.ones(2)))
    assert jp.compressed(fn).explain(*shapes).choices == found.choices
    large = jp.quantize_tree({"w": jnp.ones((4200, 4200))}, bits=8)
    with pytest.warns(
        UserWarning, match="71 MB are made dense.*'w' for abs at .*test_compressed.py"
    ):
        jax.eval_shape(jp.compressed(fn), large, jnp.ones(2))


def test_bad_input():
    with pytest.raises(ValueError, match="activations"):
        jp.compressed(lambda p: p, activations="int3")


GROUPED = {
    "int8": {"bits": 8, "group_size": 4},
    "int4_asymmetric": {"bits": 4, "group_size": 4, "symmetric": False},
    "nf4": {"dtype": "nf4", "group_size": 2},
    "large": {"bits": 8, "group_size": 64},
}
LAYOUTS = {
    "matrix": ((128, 20), "rk,kn->rn"),
    "transposed": ((64, 24), "rk,nk->rn"),
    "heads": ((24, 4, 8), "rd,dhk->rhk"),
    "out of heads": ((4, 8, 12), "rhk,hkd->rd"),
    "experts": ((4, 24, 20), "rek,ekn->ren"),
    "middle": ((6, 24, 8), "rk,akb->rab"),
    "odd": ((4, 24, 7), "rd,hdk->rhk"),
}


OFTEN = ("int8", "int4_asymmetric", "nf4", "groups of int4_asymmetric", "groups of large")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow)
        for kind in (*KINDS, *(f"groups of {name}" for name in GROUPED))
    ],
)
def test_any_layout(layout, kind, monkeypatch):
    from jaxprune.runtime import _blocked, _lowerings

    settings = GROUPED[kind[10:]] if kind.startswith("groups") else KINDS[kind]
    shape, equation = LAYOUTS[layout]
    if shape[-2] % settings.get("group_size", 1):
        pytest.skip("groups do not divide it")
    tree = jp.quantize_tree({"w": normal(*shape)}, **settings)
    dense = jp.dequantize_tree(tree)
    left, right = equation.split("->")[0].split(",")
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])
    # in one block, and in many of which the last is smaller
    whole = _blocked.blocked_product
    # (blocks of a few entries of it break the compiler of jaxlib 0.10.0: integer products in a loop)
    part = int(np.prod(shape)) * 2 // 5
    for block, rows in ((None, 3), (part, 40)):
        if block:
            small = lambda *args, block=block, **kw: whole(*args, **{"block": block, **kw})
            monkeypatch.setattr(_lowerings, "blocked_product", small)
            _lowerings.run.clear_cache()
        sizes = dict(zip(right, shape, strict=True)) | {"r": rows}
        x = normal(*(sizes[c] for c in left), seed=1)
        run = jp.compressed(fn)
        assert error(fn(dense, x), jax.jit(run)(tree, x)) < 3e-4
        assert run.choices[0].lowering != "dense"
        if layout != "matrix":  # derivatives are those of the dense product, whatever the layout
            continue
        found, wanted = (
            jax.grad(lambda x, f=f, p=p: jnp.sum(jnp.sin(f(p, x))))(x)
            for f, p in ((run, tree), (fn, dense))
        )
        assert error(wanted, found) < 3e-3


def test_views_keep_codes():
    tree = jp.quantize_tree({"w": normal(3, 8, 16)}, bits=4)
    x = normal(5, 8, seed=1)
    cases = {
        "index": lambda p, x: x @ p["w"][1],
        "slice": lambda p, x: jnp.einsum("rk,lkn->rln", x, p["w"][1:]),
        "dynamic": lambda p, x: x @ jax.lax.dynamic_index_in_dim(p["w"], x.size % 3, 0, False),
        "reshape": lambda p, x: jnp.tile(x, 3) @ p["w"].reshape(24, 16),
        "new axis": lambda p, x: x @ p["w"][None, 2][0],
    }
    for name, fn in cases.items():
        run = jp.compressed(fn)
        assert error(fn(jp.dequantize_tree(tree), x), run(tree, x)) < 3e-4, name
        assert "dense" not in {c.lowering for c in run.choices}, name


def test_convolution_on_codes(monkeypatch):
    from jaxprune.runtime import _convolve

    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    kinds = ("int8", "int4", "asymmetric", "nf4", "float8")
    for kind, size, worth in itertools.product(kinds, (1, 3), (True, False)):
        monkeypatch.setattr(_convolve, "_WORTH", 0 if worth else 1e9)
        x = normal(2, 6, 6, 16, seed=1) * jnp.array([1.0, 100.0])[:, None, None, None]
        tree = jp.quantize_tree({"k": normal(size, size, 16, 8)}, **KINDS[kind])
        dense = jp.dequantize_tree(tree)
        lowerings = []
        for activations, tolerance in ((None, 3e-4), ("int8", 0.03), ("float8_e4m3fn", 0.1)):
            run = jp.compressed(conv, activations=activations)
            for y, z in zip(conv(dense, x), run(tree, x), strict=True):  # each example by itself
                assert error(y, z) < tolerance
            lowerings.append(run.choices[-1].lowering)
        exact = kind in ("int8", "int4") and size == 1
        integer = "integer" if exact else "int8_split"
        assert lowerings == ["converted", integer if worth else "converted", "converted"]
        run = jp.compressed(conv)
        grads = [
            jax.grad(lambda x, f=f, t=t: jnp.sum(jnp.tanh(f(t, x))))(x[:1])
            for f, t in ((conv, dense), (run, tree))
        ]
        assert error(*grads) < 3e-3
        stats = jp.calibrate(conv, dense, [x])
        for symmetric in (True, False):
            known = jp.quantize_activations(tree, stats, symmetric=symmetric)
            expected = conv(dense, known["k"].input.rounded(x))
            assert error(expected, jp.compressed(conv)(known, x)) < 3e-4
    few = jp.quantize_tree({"k": normal(3, 3, 5, 8)})
    run = jp.compressed(conv)
    run(few, x[..., :5])
    assert run.choices[-1].lowering == "converted"


TREE = jp.quantize_tree({"w": normal(16, 8)}, bits=8)
RULES = {"integer": [[2, "int8_split"], [-1, "blocked"]]}


def lowering(tuning=None, platform=None):
    run = jp.compressed(lambda p, x: x @ p["w"], tuning=tuning, platform=platform)
    return run.explain(TREE, jnp.ones((9, 16))).choices[0].lowering


def test_measured_thresholds(monkeypatch, tmp_path):
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("JAXPRUNE_TUNING", str(file))
    assert lowering() == "int8_split"
    file.write_text(json.dumps({"version": 2, "platforms": {"cpu": RULES}}))
    assert lowering() == "blocked"
    assert lowering(tuning={}) == "int8_split"
    assert lowering(tuning={"integer": [(-1, "converted")]}) == "converted"
    # a lowering that cannot multiply these codes: what fits is taken instead
    assert lowering(tuning={"integer": [(-1, "groups")]}) == "blocked"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"version": 2, "platforms": {"tpu": RULES}}))
    assert lowering(tuning=other, platform="tpu") == "blocked"
    assert lowering(tuning={}, platform="tpu") == "converted"


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        json.dumps({"cpu": RULES}),
        json.dumps({"version": 1, "platforms": {"cpu": RULES}}),
        json.dumps({"version": 2, "platforms": {"cpu": {"integers": [[-1, "blocked"]]}}}),
        json.dumps({"version": 2, "platforms": {"cpu": {"integer": [[-1, "two_planes"]]}}}),
        json.dumps({"version": 2, "platforms": {"cpu": {"integer": [[8, "blocked"]]}}}),
        json.dumps({"version": 2, "platforms": {"cpu": {"integer": [[8, 1, 2]]}}}),
    ],
)
def test_a_tuning_file_that_does_not_fit_is_ignored_once(content, monkeypatch, tmp_path):
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("JAXPRUNE_TUNING", str(file))
    file.write_text(content)
    with pytest.warns(UserWarning, match=r"tuning.json is ignored.*jaxprune tune"):
        assert lowering() == "int8_split"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lowering() == "int8_split"


def test_bad_tuning():
    for tuning in ({"integers": []}, {"integer": [(-1, "fast")]}, {"integer": [(4, "blocked")]}):
        with pytest.raises(ValueError, match="tuning"):
            jp.compressed(lambda p: p, tuning=tuning)
    with pytest.raises(ValueError, match="platform"):
        jp.compressed(lambda p: p, platform="abacus")


def test_alike_leaves_are_traced_once():
    """Out of `jit`, what a product branches into would be compiled anew for each leaf and call."""
    from jaxprune.runtime import _lowerings

    params = {f"l{i}": normal(24, 24, seed=i) / 5 for i in range(6)}
    tree, x = jp.quantize_tree(params, bits=8), normal(9, 24, seed=1)

    def fn(p, x):
        for i in range(6):
            x = jnp.tanh(x @ p[f"l{i}"])
        return x

    run, before = jp.compressed(fn), _lowerings.run._cache_size()
    y = run(tree, x)
    assert len({choice.lowering for choice in run.choices} - {"dense"}) == 1
    assert _lowerings.run._cache_size() - before <= 1
    run(tree, x)
    assert _lowerings.run._cache_size() - before <= 1
    assert error(fn(jp.dequantize_tree(tree), x), y) < 2e-3
