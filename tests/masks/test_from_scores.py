"""Selection against a stable sort in NumPy, on everything that scores can look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune.masks._keys import kept


def by_sort(arrays, keep):
    """The masks that a stable descending sort gives."""
    flat = np.concatenate([np.asarray(a).astype(np.float64).ravel() for a in arrays])
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    parts = np.split(mask, np.cumsum([a.size for a in arrays])[:-1])
    return [part.reshape(a.shape) for part, a in zip(parts, arrays, strict=True)]


def data(kind, shape, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return {
        "normal": x,
        "ties": np.round(2 * x),
        "sparse": np.where(x > 1, x, 0.0),
        "constant": np.full(shape, 0.25),
        "negative zero": np.where(x > 0, 0.0, -0.0),
        "infinite": np.where(x > 0.5, np.inf, np.where(x < -0.5, -np.inf, x)),
        "huge": x * 1e38,
        "wide": np.exp(20 * x),
    }[kind]


KINDS = ["normal", "ties", "sparse", "constant", "negative zero", "infinite", "huge", "wide"]


def check(tree, sparsity, **kw):
    got = jp.masks.from_scores(tree, sparsity, **kw)
    arrays = list(tree.values())
    if kw.get("scope") == "leaf":
        want = [by_sort([a], round((1 - sparsity) * a.size))[0] for a in arrays]
    else:
        want = by_sort(arrays, round((1 - sparsity) * sum(a.size for a in arrays)))
    for mask, expected in zip(got.values(), want, strict=True):
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_equals_a_stable_sort(kind, dtype, scope):
    shapes = {"a": (31, 17), "b": (5,), "c": (3, 3, 4, 8)}
    tree = {k: jnp.asarray(data(kind, s, i), dtype) for i, (k, s) in enumerate(shapes.items())}
    for sparsity in (0.0, 0.1, 0.5, 0.801, 0.99, 1.0):
        check(tree, sparsity, scope=scope)


@pytest.mark.parametrize("kind", ["normal", "ties", "sparse"])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_large_leaves(kind, scope):
    shapes = {"a": (1100, 1000), "b": (300, 1000), "c": (50, 3), "d": (1 << 18,)}
    tree = {k: jnp.asarray(data(kind, s, i), "float32") for i, (k, s) in enumerate(shapes.items())}
    check(tree, 0.8, scope=scope)
    check(tree, 0.3, scope=scope)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(
        st.floats(allow_nan=False, width=32, allow_subnormal=False), min_size=1, max_size=24
    ),
    sparsity=st.floats(0, 1),
)
def test_any_floats(values, sparsity):
    padded = np.full(24, -np.inf, np.float32)  # one shape, one compilation
    padded[: len(values)] = values
    tree = {"w": jnp.asarray(padded)}
    check(tree, sparsity)


def test_odd_leaves():
    tree = {"empty": jnp.zeros((0, 3)), "one": jnp.ones((1, 1)), "w": jnp.arange(6.0)}
    masks = jp.masks.from_scores(tree, 0.5)
    assert masks["empty"].shape == (0, 3)
    assert sum(int(m.sum()) for m in masks.values()) == round(0.5 * 7)
    assert jp.masks.from_scores({}, 0.5) == {}
    assert jp.masks.from_scores({"b": jnp.array(jnp.inf)}, 0.5)["b"].shape == ()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_small_floats(dtype):
    scores = jax.random.normal(jax.random.key(0), (32, 16)).astype(dtype)
    check({"w": scores}, 0.6)


def test_float64():
    with jax.enable_x64(True):
        x = 1.0 + 1e-12 * jnp.asarray(np.random.default_rng(0).permutation(1000), jnp.float64)
        mask = jp.masks.from_scores({"w": x}, 0.8)["w"]
        np.testing.assert_array_equal(mask, by_sort([x], 200)[0])


@given(sparsity=st.floats(0, 1, width=32), size=st.integers(1, 2**31 - 1))
@settings(max_examples=200, deadline=None)
def test_traced_counts_are_exact(sparsity, size):
    got = int(jax.jit(kept, static_argnums=1)(jnp.float32(sparsity), size))
    units = round(float(np.float32(1) - np.float32(sparsity)) * 2**24)
    whole, rest = divmod(units * size, 2**24)
    want = whole + (rest > 2**23 or (rest == 2**23 and whole % 2 == 1))
    assert got == want


def test_traced_sparsity_compiles_once(params):
    scores = jp.scores.magnitude(params)
    traces = []

    @jax.jit
    def f(scores, sparsity):
        traces.append(1)
        return jp.masks.from_scores(scores, sparsity)

    for sparsity in (0.0, 0.25, 0.5, 1.0):
        got = f(scores, jnp.float32(sparsity))
        want = jp.masks.from_scores(scores, sparsity)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert len(traces) == 1


def test_vmap_over_sparsity():
    scores = {"w": jnp.arange(24.0).reshape(4, 6)}
    count = jax.vmap(lambda s: jp.masks.from_scores(scores, s)["w"].sum())
    assert count(jnp.array([0.0, 0.25, 0.5, 1.0])).tolist() == [24, 18, 12, 0]


def test_vmap_over_scores():
    x = jax.random.normal(jax.random.key(0), (3, 8, 8))
    masks = jax.vmap(lambda s: jp.masks.from_scores({"w": s}, 0.5)["w"])(x)
    for i in range(3):
        np.testing.assert_array_equal(masks[i], jp.masks.from_scores({"w": x[i]}, 0.5)["w"])


def test_budget_tree(params, container):
    tree = container(params)
    scores = jp.scores.magnitude(tree)
    budget = jax.tree.map(lambda s: 0.75 if s.shape == (16, 10) else 0.5, scores)
    masks = jp.masks.from_scores(scores, budget)
    assert jax.tree.structure(masks) == jax.tree.structure(tree)
    kept = {m.shape: int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim}
    assert kept == {(3, 3, 4, 8): 144, (16, 10): 40, (7, 5): 18}


def test_bad_input(params):
    scores = jp.scores.magnitude(params)
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="sparsity"):
            jp.masks.from_scores(scores, bad)
    with pytest.raises(ValueError, match="sparsity"):
        jp.masks.from_scores(scores, {"other": 0.5})
    with pytest.raises(ValueError, match="scope"):
        jp.masks.from_scores(scores, 0.5, scope="layer")
    with pytest.raises(ValueError, match="NaN in leaf 'embed'"):
        jp.masks.from_scores({**scores, "embed": scores["embed"].at[0, 0].set(jnp.nan)}, 0.5)
    with pytest.raises(TypeError, match="'w'.*floats"):
        jp.masks.from_scores({"w": jnp.arange(4)}, 0.5)


class TestSharded:
    """On eight devices: the same masks, sharded alike, and nothing but counts exchanged."""

    @pytest.fixture
    def mesh(self):
        return jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    @pytest.fixture
    def scores(self, mesh):
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        a, b = jax.random.normal(jax.random.key(0), (2, 64, 32))
        return {
            "a": put(jnp.round(8 * a) / 8, "x", "y"),
            "b": put(b, None, "y"),
            "c": jnp.ones((5, 3)),
        }

    @pytest.mark.parametrize("scope", ["global", "leaf"])
    def test_equals_one_device(self, scores, scope):
        masks = jp.masks.from_scores(scores, 0.7, scope=scope)
        alone = jp.masks.from_scores(jax.device_get(scores), 0.7, scope=scope)
        jax.tree.map(np.testing.assert_array_equal, masks, alone)
        for name in "ab":
            assert masks[name].sharding.is_equivalent_to(scores[name].sharding, 2)

    def test_exchanges_only_counts(self, scores):
        compiled = jax.jit(lambda s: jp.masks.from_scores(s, 0.7)).lower(scores).compile()
        text = compiled.as_text()
        for operation in ("all-gather", "all-to-all", "collective-permute"):
            assert operation not in text
        assert "all-reduce" in text
        for line in text.splitlines():
            if " all-reduce(" in line:
                assert "f32" not in line.split(" all-reduce(")[0]
