"""One contract for all budgets, and each rule against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def fn(p, x):
    read = lambda leaf: leaf[...] if hasattr(leaf, "at") or hasattr(leaf, "get_value") else leaf
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        x, read(p["conv"]["kernel"]), (1, 1), "SAME", dimension_numbers=dims
    )
    h = jax.nn.relu(h + read(p["conv"]["bias"])).mean((1, 2))
    return jnp.tanh(h @ read(p["dense"]["kernel"])) @ read(p["embed"])


@pytest.fixture
def params():
    return {
        "conv": {"kernel": normal(3, 3, 4, 8), "bias": jnp.zeros(8)},
        "dense": {"kernel": 2 * normal(8, 30, seed=1)},
        "embed": 3 * normal(30, 7, seed=2),
    }


X = normal(2, 5, 5, 4, seed=3)

SHAPES = {
    "uniform": jp.budgets.uniform,
    "er": jp.budgets.er,
    "erk": jp.budgets.erk,
    "linear": jp.budgets.linear,
}
VALUES = {
    "global_": jp.budgets.global_,
    "lamp": jp.budgets.lamp,
    "owl": lambda p, s, **kw: jp.budgets.owl(p, jp.calibrate(fn, p, [X]), s, **kw),
}
BUDGETS = SHAPES | VALUES  # `flops` has another total


def total(params, budget):
    chosen = [
        (p.size, s)
        for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(budget), strict=True)
        if p.ndim >= 2
    ]
    return sum(n * s for n, s in chosen) / sum(n for n, _ in chosen)


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.99, 1.0])
def test_total(name, sparsity, params):
    budget = BUDGETS[name](params, sparsity)
    assert total(params, budget) == pytest.approx(sparsity, abs=1e-9)
    assert all(type(s) is float and 0 <= s <= 1 for s in jax.tree.leaves(budget))
    assert budget["conv"]["bias"] == 0.0


@pytest.mark.parametrize("name", BUDGETS)
def test_containers_and_masks(name, params, container):
    tree = container(params)
    budget = BUDGETS[name](tree, 0.8)
    assert jax.tree.structure(budget) == jax.tree.structure(tree)
    plain = jax.tree.leaves(BUDGETS[name](params, 0.8))
    np.testing.assert_allclose(jax.tree.leaves(budget), plain, atol=1e-9)
    masks = jp.masks.from_scores(jp.scores.magnitude(tree), budget)
    assert jp.sparsity(masks) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("name", BUDGETS)
def test_bounds_hold_and_the_total_is_met(name, params):
    budget = BUDGETS[name](
        params, 0.65, max_sparsity={"dense/kernel": 0.7}, min_keep=60, fixed={"conv/.*": 0.6}
    )
    assert total(params, budget) == pytest.approx(0.65, abs=1e-9)
    assert budget["conv"]["kernel"] == pytest.approx(0.6)
    assert budget["dense"]["kernel"] <= 0.7 + 1e-9
    assert (1 - budget["embed"]) * 210 >= 60 - 1e-6
    with pytest.raises(ValueError, match="sparsity: 0.9 is out of reach"):
        BUDGETS[name](params, 0.9, max_sparsity=0.8)
    with pytest.raises(ValueError, match="out of reach"):
        BUDGETS[name](params, 0.01, fixed={"conv/.*": 0.9})
    with pytest.raises(ValueError, match="fixed: 'convs/.*nearest"):
        BUDGETS[name](params, 0.5, fixed={"convs/kernel": 0.9})
    with pytest.raises(ValueError, match="two patterns"):
        BUDGETS[name](params, 0.5, fixed={"conv/.*": 0.9, ".*/kernel": 0.1})


@pytest.mark.parametrize("name", BUDGETS)
def test_bad_input(name, params):
    make = BUDGETS[name]
    with pytest.raises(ValueError, match="not per cent"):
        make(params, 80)
    with pytest.raises(ValueError, match="sparsity"):
        make(params, float("nan"))
    with pytest.raises(ValueError, match=r"max_sparsity.*not per cent"):
        make(params, 0.5, max_sparsity=90)
    with pytest.raises(ValueError, match="min_keep"):
        make(params, 0.5, min_keep=-1)
    with pytest.raises(ValueError, match="nearest"):
        make(params, 0.5, where="dense/kernels")
    if name == "owl":
        stats = jp.calibrate(fn, params, [X])
        make = lambda p, s: jp.budgets.owl(p, stats, s)
    with pytest.raises(TypeError, match="sparsity.*outside jit"):
        jax.jit(lambda s: make(params, s))(0.5)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_suffice(name, params):
    structs = jax.eval_shape(lambda: params)
    assert SHAPES[name](structs, 0.7) == SHAPES[name](params, 0.7)
    under_jit = []
    jax.jit(lambda p: under_jit.append(SHAPES[name](p, 0.7)))(params)
    assert under_jit[0] == SHAPES[name](params, 0.7)


@pytest.mark.parametrize("name", ["global_", "lamp"])
def test_values_are_needed(name, params):
    with pytest.raises(TypeError, match=r"'conv/kernel' has no value.*erk"):
        BUDGETS[name](jax.eval_shape(lambda: params), 0.5)


def stacked(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["first"], p["layers"])[0]


STACK = {"first": normal(6, 8), "layers": normal(3, 8, 8, seed=1)}


def test_stacked_leaves():
    """With `uses`, a stack counts as its layers."""
    uses = jp.uses(stacked, STACK, normal(2, 6))
    apart = {"first": STACK["first"], **{str(i): STACK["layers"][i] for i in range(3)}}
    for name in ("er", "erk"):
        one = BUDGETS[name](STACK, 0.6, uses=uses)
        many = BUDGETS[name](apart, 0.6)
        assert one["layers"] == pytest.approx(many["0"])
        assert one["first"] == pytest.approx(many["first"])
    budget = jp.budgets.uniform(STACK, 0.65, uses=uses, min_keep=20, fixed={"first": 0.5})
    assert (1 - budget["layers"]) * 64 == pytest.approx(20, abs=1e-6)
    masks = jp.masks.from_scores(jp.scores.magnitude(STACK), budget, uses=uses, min_keep=20)
    assert masks["layers"].sum((1, 2)).tolist() == [20] * 3


def test_two_extremes_of_bounds(params):
    budget = jp.budgets.erk(params, 0.8, max_sparsity=0.8)
    assert jax.tree.leaves(budget) == pytest.approx([0.0, 0.8, 0.8, 0.8])


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 64), min_size=2, max_size=4), min_size=1, max_size=6),
    sparsity=st.floats(0, 1),
)
def test_erk_is_proportional_where_not_dense(shapes, sparsity):
    tree = {str(i): jax.ShapeDtypeStruct(tuple(s), jnp.float32) for i, s in enumerate(shapes)}
    density = {k: 1 - s for k, s in jp.budgets.erk(tree, sparsity).items()}
    assert total(tree, jp.budgets.erk(tree, sparsity)) == pytest.approx(sparsity, abs=1e-6)
    ratio = [
        d / (sum(tree[k].shape) / np.prod(tree[k].shape))
        for k, d in density.items()
        if d < 1 - 1e-9
    ]
    assert np.allclose(ratio, ratio[:1] * len(ratio), rtol=1e-4, atol=1e-9)


def test_er_leaves_the_window_out(params):
    budget = jp.budgets.er(params, 0.8)
    ratio = (1 - budget["conv"]["kernel"]) / (1 - budget["embed"])
    assert ratio == pytest.approx(((4 + 8) / 32) / ((30 + 7) / 210))
    by_uses = jp.budgets.er(params, 0.8, uses=jp.uses(fn, params, X))
    assert jax.tree.leaves(by_uses) == pytest.approx(jax.tree.leaves(budget))


@pytest.mark.parametrize("name", ["global_", "lamp"])
def test_thresholds_are_those_of_masks(name, params):
    score = {"global_": jp.scores.magnitude, "lamp": jp.scores.lamp}[name]
    budget = BUDGETS[name](params, 0.7)
    masks = jp.masks.from_scores(score(params), 0.7)
    for s, mask in zip(jax.tree.leaves(budget), jax.tree.leaves(masks), strict=True):
        assert s == pytest.approx(1 - float(mask.mean()), abs=1.0 / max(mask.size, 2) + 1e-6)


def test_threshold_with_ties_and_infinite_scores():
    tree = {"a": jnp.ones((4, 5)), "b": jnp.ones((10, 8))}
    assert jp.budgets.global_(tree, 0.3) == pytest.approx({"a": 0.3, "b": 0.3})
    score = lambda p: {"a": jnp.full((4, 5), jnp.inf), "b": jnp.abs(normal(10, 8))}
    assert jp.budgets.global_(tree, 0.4, score_fn=score) == pytest.approx({"a": 0.0, "b": 0.5})
    with pytest.raises(ValueError, match="NaN in leaf 'a'"):
        jp.budgets.global_(tree, 0.4, score_fn=lambda p: {"a": p["a"] * jnp.nan, "b": p["b"]})
    with pytest.raises(ValueError, match=r"'a'.*scores of shape \(\)"):
        jp.budgets.global_(tree, 0.4, score_fn=lambda p: {"a": jnp.inf, "b": p["b"]})


def test_linear_follows_the_depth():
    tree = {f"layers_{i}": jnp.ones((4, 4)) for i in range(12)}
    budget = jp.budgets.linear(tree, 0.5, slope=0.3)
    assert [budget[f"layers_{i}"] for i in range(12)] == pytest.approx(
        list(np.linspace(0.35, 0.65, 12))
    )
    order = [r"layers_\d", r"layers_1\d"]
    budget = jp.budgets.linear(tree, 0.5, slope=0.6, order=order)
    assert budget["layers_0"] == budget["layers_9"] == pytest.approx(0.4)
    assert budget["layers_11"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no pattern matches 'layers_10'"):
        jp.budgets.linear(tree, 0.5, order=order[:1])
    with pytest.raises(ValueError, match="slope"):
        jp.budgets.linear(tree, 0.5, slope=2)


def scanned(p, x):
    h = jnp.mean(x @ p["often"], 0, keepdims=True) @ p["once"] + p["table"][0]
    return jax.lax.scan(lambda h, w: (h @ w, None), h, p["layers"])[0]


def test_flops_meets_the_flops():
    params = {
        "often": normal(4, 4), "once": normal(4, 4), "table": normal(9, 4), "layers": normal(3, 4, 4),
    }  # fmt: skip
    graph = jp.trace(scanned, params, normal(10, 4))
    costs = dict(zip(graph.paths, graph.leaf_flops, strict=True))
    assert costs == {"often": 320, "once": 32, "table": 0, "layers": 96}
    assert sum(graph.leaf_flops) == 2 * graph.cost().macs
    for power in (0.0, 0.5, 1.0):
        budget = jp.budgets.flops(graph, params, 0.6, power=power)
        assert sum((1 - budget[k]) * costs[k] for k in costs) == pytest.approx(0.4 * 448)
        assert budget["table"] == 0.0
        assert budget["once"] == pytest.approx(budget["layers"])
    density = {k: 1 - s for k, s in jp.budgets.flops(graph, params, 0.8, power=0.5).items()}
    assert density["once"] / density["often"] == pytest.approx(10**0.5)
    assert budget["often"] > budget["once"]
    with pytest.raises(ValueError, match="no product"):
        jp.budgets.flops(graph, params, 0.5, where="table")
    with pytest.raises(TypeError, match="graph"):
        jp.budgets.flops(params, params, 0.5)


def test_flops_of_convolutions(params):
    graph = jp.trace(fn, params, X)
    costs = dict(zip(graph.paths, graph.leaf_flops, strict=True))
    assert sum(costs.values()) == 2 * graph.cost().macs
    budget = jp.budgets.flops(graph, params, 0.5)
    assert budget["conv"]["kernel"] > budget["dense"]["kernel"]


def test_owl_is_the_papers_rule(params):
    stats = jp.calibrate(fn, params, [X])
    budget = jp.budgets.owl(params, stats, 0.6, threshold=2.0, deviation=0.05)
    wanda = [s for s in jax.tree.leaves(jp.scores.wanda(params, stats)) if s.ndim]
    names = ("conv", "dense", "embed")
    ratios = {k: float((s > 2.0 * s.mean()).mean()) for k, s in zip(names, wanda, strict=True)}
    low, high = min(ratios.values()), max(ratios.values())
    found = dict(zip(names, [s for s in jax.tree.leaves(budget) if s], strict=True))
    level = {k: (r - low) / (high - low) * 0.1 for k, r in ratios.items()}
    shift = {k: 1 - found[k] - level[k] for k in found}
    assert list(shift.values()) == pytest.approx([shift["conv"]] * 3)
    assert max(found.values()) - min(found.values()) == pytest.approx(0.1)


def test_owl_by_blocks_and_in_stacks():
    tree = {
        f"layers_{i}": {"a": normal(6, 6, seed=i), "b": normal(6, 6, seed=9 + i)} for i in range(3)
    }

    def run(p, x):
        for layer in p.values():
            x = jnp.tanh(x @ layer["a"]) @ layer["b"]
        return x

    tree["layers_1"]["a"] = tree["layers_1"]["a"].at[0, 0].set(90.0)
    stats = jp.calibrate(run, tree, [normal(5, 6)])
    budget = jp.budgets.owl(tree, stats, 0.5, threshold=2.0, blocks=r"(layers_\d)/.*")
    assert all(layer["a"] == pytest.approx(layer["b"]) for layer in budget.values())
    assert len({round(layer["a"], 6) for layer in budget.values()}) > 1
    with pytest.raises(ValueError, match="a group"):
        jp.budgets.owl(tree, stats, 0.5, blocks=r"layers_\d/.*")
    with pytest.raises(ValueError, match="blocks: .*matches no path"):
        jp.budgets.owl(tree, stats, 0.5, blocks=r"(block_\d)/.*")
    scaled = {"first": STACK["first"], "layers": STACK["layers"].at[0].multiply(100.0)}
    one = jp.budgets.owl(scaled, jp.calibrate(stacked, scaled, [normal(4, 6)]), 0.5, threshold=2.0)
    two = jp.budgets.owl(STACK, jp.calibrate(stacked, STACK, [normal(4, 6)]), 0.5, threshold=2.0)
    assert abs(one["layers"] - two["layers"]) < 0.2  # a larger layer is no outlier


def test_owl_refuses_leaves_that_saw_nothing():
    tree = {"a": normal(3, 4), "idle": normal(3, 4)}
    stats = jp.calibrate(lambda p, x: x @ p["a"], tree, [normal(2, 3)])
    with pytest.raises(ValueError, match="nothing was multiplied by leaf 'idle'"):
        jp.budgets.owl(tree, stats, 0.5, where=".*")
    assert jp.budgets.owl(tree, stats, 0.5)["idle"] == 0.0
