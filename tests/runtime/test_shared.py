"""Clustered, factorised and tied leaves under `jp.compressed`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from tests.structure._zoo import build, normal

LAYOUTS = {
    "k,n": ((24, 20), "rk,kn->rn"),
    "n,k": ((20, 24), "rk,nk->rn"),
    "heads": ((24, 4, 8), "rd,dhk->rhk"),
    "merged heads": ((4, 8, 12), "rhk,hkd->rd"),
    "experts": ((4, 24, 20), "rek,ekn->ren"),
    "permuted": ((8, 24, 4), "rd,kdh->rhk"),
}
CLUSTERS = {
    "4 bits": {"bits": 4},
    "5 bits": {"bits": 5},
    "6 bits": {"bits": 6},
    "channels": {"bits": 2, "granularity": "channel"},
    "groups": {"bits": 2, "group_size": 4},
    "zero": {"bits": 3, "preserve_zeros": True},
    "integers": {"bits": 4},
    "integers of 5 bits": {"bits": 5},
    "vectors": {"bits": 3, "vector_size": 2},
}


def error(wanted, found):
    wanted, found = (np.asarray(x, np.float64) for x in (wanted, found))
    return np.abs(wanted - found).max() / max(np.abs(wanted).max(), 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=[] if kind in ("4 bits", "groups", "integers") else pytest.mark.slow
        )
        for kind in CLUSTERS
    ],
)
def test_products_of_clusters(layout, kind, monkeypatch):
    from jaxprune.runtime import _blocked, _lowerings

    shape, equation = LAYOUTS[layout]
    if shape[-1] % CLUSTERS[kind].get("group_size", 1):
        pytest.skip("groups do not divide it")
    tree = jp.cluster_tree({"w": normal(*shape)}, **CLUSTERS[kind])
    if kind.startswith("integers"):
        tree = jp.quantize_tree(tree, bits=8)
    dense = jp.materialize_tree(tree)
    left, right = equation.split("->")[0].split(",")
    fn = lambda p, x: jnp.einsum(equation, x, p["w"])
    whole, part = _blocked.blocked_product, int(np.prod(shape)) * 2 // 5
    for block, rows in ((None, 1), (part, 40)):
        if block:
            small = lambda *args, block=block, **kw: whole(*args, **{"block": block, **kw})
            monkeypatch.setattr(_lowerings, "blocked_product", small)
            _lowerings.run.clear_cache()
        sizes = dict(zip(right, shape, strict=True)) | {"r": rows}
        x = normal(*(sizes[c] for c in left), seed=1)
        run = jp.compressed(fn)
        assert error(fn(dense, x), jax.jit(run)(tree, x)) < 5e-4
        # a last axis too short to pack is packed along another one, which has no products
        if kind != "vectors" and getattr(tree["w"], "axis", -1) == -1:
            assert run.choices[0].lowering != "dense"


def test_codebooks_train_through_products():
    tree, x = jp.cluster_tree({"w": normal(16, 12)}, bits=3), normal(40, 16, seed=1)
    fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
    found = jax.grad(jp.compressed(fn), allow_int=True)(tree, x)["w"].codebook
    plain = jax.grad(lambda t: fn(jp.materialize_tree(t), x), allow_int=True)(tree)["w"].codebook
    np.testing.assert_allclose(found, plain, rtol=2e-3, atol=2e-3)


def test_rows_of_clusters_and_factors():
    params = {"e": normal(50, 12), "g": normal(50, 12, seed=1)}
    fn = lambda p, i: p["e"][i] + p["g"][i]
    index = jnp.array([[3, 49, -1], [0, 7, 7]])
    trees = {
        "clusters": jp.cluster_tree(params, bits=3),
        "groups": jp.cluster_tree(params, bits=1, group_size=5, channel_axis=-2),
        "factors": jp.factorize_tree(params, rank=4),
    }
    for name, tree in trees.items():
        run = jp.compressed(fn)
        assert error(fn(jp.materialize_tree(tree), index), run(tree, index)) < 1e-5, name
        assert {c.lowering for c in run.choices} == {"rows"}, name


ZOO = [
    "flatten_cnn",
    "transformer",
    "grouped",
    "channels_first",
    "routed_experts",
    "scanned_layers",
]


QUICK = [("flatten_cnn", "clusters"), ("flatten_cnn", "tucker"), ("scanned_layers", "factors")]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[] if (name, how) in QUICK else pytest.mark.slow)
        for name in ZOO
        for how in ("clusters", "factors", "tucker", "quantized factors")
    ],
)
@pytest.mark.filterwarnings("ignore:factorize_tree")
def test_networks(name, how):
    fn, params, x = build(name)
    if how == "clusters":
        where = lambda path, leaf: leaf.ndim >= 2 and len(np.unique(leaf)) > 4
        tree = jp.cluster_tree(params, bits=2, where=where)
    elif how == "tucker":
        if name == "channels_first" or not any(x.ndim >= 4 for x in jax.tree.leaves(params)):
            pytest.skip("no kernels of (…, in, out)")
        where = lambda path, leaf: leaf.ndim >= 4
        tree = jp.factorize_tree(params, rank=0.3, method="tucker", where=where)
    else:
        tree = jp.factorize_tree(params, rank=0.3)
        tree = jp.quantize_tree(tree, bits=8) if how.startswith("quantized") else tree
    wanted = jax.jit(fn)(jp.materialize_tree(tree), x)
    run = jp.compressed(fn)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(jax.jit(run)(tree, x)), strict=True):
        assert error(a, b) < 3e-3
    assert {c.lowering for c in run.choices} - {"dense"}


def test_factors_take_less_work():
    fn = lambda p, x: x @ p["w"]
    tree, x = jp.factorize_tree({"w": normal(256, 256)}, rank=16), normal(8, 256, seed=1)
    flops = [
        jax.jit(f).lower(t, x).compile().cost_analysis()["flops"]
        for f, t in ((fn, jp.materialize_tree(tree)), (jp.compressed(fn), tree))
    ]
    assert flops[1] < 0.2 * flops[0]


def test_a_tied_tree_runs_as_it_is():
    params = {"a": normal(8, 8), "b": normal(8, 8), "bias": normal(8)}
    fn = lambda p, x: jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]
    tied, x = jp.tie_tree(params, threshold=0.9), normal(3, 8, seed=2)
    np.testing.assert_allclose(jp.compressed(fn)(tied, x), fn(params, x), rtol=1e-5, atol=1e-5)
