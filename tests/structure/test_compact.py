"""Removed equals masked, on a zoo of topologies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp
import tests.structure._more_networks
import tests.structure._strangers  # noqa: F401
from tests.structure._zoo import IMAGE, ZOO, build, normal, randomized

# networks of which nothing may shrink, and the reason that must be given
WHOLE = {
    "softmax_over_features": "reduce_max",
    "cumulative_and_sorted": "runs along it",
    "carry_that_stops_being_zero": "reduce_sum",
}


def random_masks(graph, fraction, seed=0):
    """Masks of a random selection of units of every group."""
    rng = np.random.default_rng(seed)
    gone = np.zeros(len(graph.solution.reason), bool)
    for group in graph.groups:
        gone[rng.choice(group.units, int(group.size * fraction), replace=False)] = True
    return jp.structure._scoring.masks_without(graph, gone)


def assert_close(a, b, tolerance=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= tolerance * max(np.abs(x).max(), 1e-3)


@pytest.mark.parametrize("name", ZOO)
def test_removed_equals_masked(name):
    fn, params, x = build(name)
    graph = jp.trace(fn, params, x)
    masks = random_masks(graph, 0.5)
    masked = jp.apply_masks(params, masks)
    compact_fn, small = jp.compact(fn, params, masks, x)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (small, params)]
    if name in WHOLE:
        assert any(WHOLE[name] in reason for _, reason in graph.frozen), graph.frozen
    else:
        assert sizes[0] < sizes[1]
    tolerance = 0.05 if name == "bfloat16_mlp" else 1e-4
    full, compacted = jax.jit(fn), jax.jit(compact_fn)
    assert_close(full(masked, x), compacted(small, x), tolerance)
    twice = jnp.concatenate([x, x[::-1]])
    assert_close(full(masked, twice), compacted(small, twice), tolerance)
    widths = jp.structure.widths(graph, masks)
    assert list(widths.values()) == [leaf.shape for leaf in jax.tree.leaves(small)]


FEW = ["mlp", "depthwise", "qkv_in_one", "scanned_layers"]


@pytest.mark.parametrize(
    "name",
    [
        n if n in FEW else pytest.param(n, marks=pytest.mark.slow)
        for n in ZOO
        if n != "equilibrium_by_while"  # JAX has no reverse mode through while loops
    ],
)
def test_gradients_agree(name):
    fn, params, x = build(name)
    masks = random_masks(jp.trace(fn, params, x), 0.5)
    compact_fn, small = jp.compact(fn, params, masks, x)
    floats = lambda out: [v for v in jax.tree.leaves(out) if jnp.issubdtype(v.dtype, jnp.floating)]
    loss = lambda f: lambda p: sum(jnp.sum(jnp.sin(v.astype(jnp.float32))) for v in floats(f(p, x)))
    full = jax.grad(loss(fn), allow_int=True)(jp.apply_masks(params, masks))
    graph = jp.trace(fn, params, x)
    removed = graph.removal(masks).ids
    for axes, a, b in zip(
        graph.own,
        jax.tree.leaves(full),
        jax.tree.leaves(jax.grad(loss(compact_fn), allow_int=True)(small)),
        strict=True,
    ):
        for axis, ids in enumerate(axes.ids):
            a = jnp.take(a, np.flatnonzero(~removed[ids]), axis=axis)
        assert_close(a, b, 1e-3)


def test_train_mode_with_mutable_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3))(x)))
            return nn.Dense(3)(x.mean((1, 2)))

    variables = randomized(Net().init(jax.random.key(0), IMAGE))
    fn = lambda v, x: Net().apply(v, x, mutable=["batch_stats"])
    updates = lambda out: out[1]
    frozen = jp.trace(fn, variables, IMAGE)
    assert not frozen.groups
    graph = jp.trace(fn, variables, IMAGE, updates=updates)
    assert [group.size for group in graph.groups] == [8]
    masks = random_masks(graph, 0.5)
    compact_fn, small = jp.compact(fn, variables, masks, IMAGE, updates=updates)
    logits, stats = compact_fn(small, IMAGE)
    assert_close(fn(jp.apply_masks(variables, masks), IMAGE)[0], logits)
    assert stats["batch_stats"]["BatchNorm_0"]["mean"].shape == (4,)
    with pytest.raises(ValueError, match="updates"):
        jp.trace(fn, variables, IMAGE, updates=lambda out: {"other": out[1]})


def test_what_is_not_wholly_masked_stays():
    fn, params, x = build("mlp")
    _, masks = jp.prune_tree(params, 0.5)
    compact_fn, small = jp.compact(fn, params, masks, x)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, params)
    assert_close(fn(jp.apply_masks(params, masks), x), compact_fn(small, x))


def test_vmap_and_export_of_the_small_function():
    fn, params, x = build("mlp")
    masks = random_masks(jp.trace(fn, params, x), 0.5)
    compact_fn, small = jp.compact(fn, params, masks, x)
    stacked = jnp.stack([x, 2 * x])
    assert_close(jax.vmap(lambda v: compact_fn(small, v))(stacked)[1], compact_fn(small, 2 * x))
    exported = jax.export.export(jax.jit(compact_fn))(small, x)
    assert_close(exported.call(small, x), compact_fn(small, x))


class TestUnitMasks:
    @pytest.fixture
    def traced(self):
        fn, params, x = build("residual")
        return fn, params, x, jp.trace(fn, params, x)

    @pytest.mark.parametrize("scope", ["global", "leaf", "isomorphic"])
    @pytest.mark.parametrize("reduce", ["kernels", "mean", "l1", "l2", "max", "first"])
    @pytest.mark.parametrize("normalize", ["mean", "none", "max", "sum", "gaussian"])
    def test_sparsity(self, traced, scope, reduce, normalize):
        fn, params, x, graph = traced
        masks = jp.structure.unit_masks(
            graph,
            jp.scores.magnitude(params),
            sparsity=0.5,
            scope=scope,
            reduce=reduce,
            normalize=normalize,
        )
        gone = graph.removal(masks).units
        total = sum(group.size for group in graph.groups)
        if scope == "leaf":
            assert all(gone[g.units].sum() == round(0.5 * g.size) for g in graph.groups)
        else:
            assert abs(gone.sum() - 0.5 * total) <= len(graph.groups)

    @pytest.mark.parametrize("target", ["flops", "params"])
    @pytest.mark.parametrize("value", [0.5, 0.25])
    def test_targets(self, traced, target, value):
        fn, params, x, graph = traced
        masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), **{target: value})
        compact_fn, small = jp.compact(fn, params, masks, x)
        cost = jp.trace(compact_fn, small, x).cost().flops / graph.cost().flops
        size = sum(v.size for v in jax.tree.leaves(small)) / sum(
            v.size for v in jax.tree.leaves(params)
        )
        found = cost if target == "flops" else size
        assert value - 0.12 < found <= value + 0.01
        assert_close(fn(jp.apply_masks(params, masks), x), compact_fn(small, x))

    def test_the_lowest_units_go(self, traced):
        _, params, _, graph = traced
        masks = jp.structure.unit_masks(
            graph, jp.scores.magnitude(params), sparsity=0.5, scope="leaf", reduce="first"
        )
        group = next(g for g in graph.groups if len({p for p, _ in g.members}) > 1)
        path, axis = next((p, a) for p, a in group.members if p.endswith("kernel"))
        flat = dict(zip(graph.paths, jax.tree.leaves(masks), strict=True))
        assert flat[path].shape[axis] == group.size

    def test_round_to_min_units_and_ignore(self, traced):
        fn, params, x, graph = traced
        scores = jp.scores.magnitude(params)
        widths = lambda **kw: jp.structure.widths(
            graph, jp.structure.unit_masks(graph, scores, sparsity=0.7, **kw)
        )
        assert all(shape[-1] % 4 == 0 for p, shape in widths(round_to=4).items() if "Conv" in p)
        assert all(shape[-1] >= 3 for p, shape in widths(min_units=3).items() if "Conv" in p)
        whole = widths(ignore=[".*Conv_0/kernel"])
        assert whole["params/Conv_0/kernel"] == (3, 3, 3, 8)
        everything = jp.structure.unit_masks(graph, scores, sparsity=1.0)
        assert all(min(s) > 0 for s in jp.structure.widths(graph, everything).values())

    def test_works_with_masked_update(self, traced):
        import optax

        fn, params, x, graph = traced
        masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5)
        tx = jp.masked_update(optax.sgd(1e-3), masks)  # variances must stay above zero
        state = tx.init(params)
        grads = jax.grad(lambda p: jnp.sum(fn(p, x)))(params)
        updates, _ = tx.update(grads, state, params)
        trained = optax.apply_updates(params, updates)
        compact_fn, small = jp.compact(fn, trained, masks, x)
        assert_close(fn(trained, x), compact_fn(small, x))

    def test_bad_input(self, traced):
        _, params, _, graph = traced
        scores = jp.scores.magnitude(params)
        for kw in ({}, {"sparsity": 0.5, "flops": 0.5}):
            with pytest.raises(ValueError, match="expected one of"):
                jp.structure.unit_masks(graph, scores, **kw)
        with pytest.raises(ValueError, match="sparsity"):
            jp.structure.unit_masks(graph, scores, sparsity=50)
        with pytest.raises(ValueError, match="out of reach"):
            jp.structure.unit_masks(graph, scores, flops=0.0)
        with pytest.raises(ValueError, match="ignore"):
            jp.structure.unit_masks(graph, scores, sparsity=0.5, ignore=["nothing"])
        with pytest.raises(ValueError, match="scores"):
            jp.structure.unit_masks(graph, {"w": jnp.ones(3)}, sparsity=0.5)


def test_a_masked_leaf_of_a_living_layer_keeps_its_shape():
    fn, params, x = build("mlp")
    masks = jax.tree.map(lambda _: jnp.array(True), params)
    masks["params"]["Dense_1"]["bias"] = jnp.zeros(16, bool)
    compact_fn, small = jp.compact(fn, params, masks, x, verify=True)
    assert small["params"]["Dense_1"]["bias"].shape == (16,)
    assert not small["params"]["Dense_1"]["bias"].any()
    assert_close(fn(jp.apply_masks(params, masks), x), compact_fn(small, x))


def test_verify(monkeypatch):
    fn, params, x = build("several_outputs")
    masks = random_masks(jp.trace(fn, params, x), 0.5)
    compact_fn, _ = jp.compact(fn, params, masks, x, verify=True)
    assert set(compact_fn.differences) == {"features", "logits"}
    assert max(compact_fn.differences.values()) < 1e-5
    compact_fn, _ = jp.compact(fn, params, masks, x)
    assert compact_fn.differences is None
    right = jp.structure._function.run
    wrong = lambda plan, inputs: [x + 0.1 for x in right(plan, inputs)]
    monkeypatch.setattr(jp.structure._function, "run", wrong)
    with pytest.raises(ValueError, match="verify: output .* differs"):
        jp.compact(fn, params, masks, x, verify=True)


def test_arguments_that_are_no_arrays_keep_their_value():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train, *, scale=1.0, mode="plain"):
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
            return nn.Dense(3)(x) * scale if mode == "scaled" else nn.Dense(3)(x)

    x = normal(4, 5)
    params = randomized(Net().init(jax.random.key(0), x, False))
    fn = Net().apply
    kwargs = {"scale": 2.0, "mode": "scaled", "rngs": {"dropout": jax.random.key(1)}}
    graph = jp.trace(fn, params, x, True, **kwargs)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5)
    compact_fn, small = jp.compact(fn, params, masks, x, True, verify=True, **kwargs)
    masked = jp.apply_masks(params, masks)
    assert_close(fn(masked, x, True, **kwargs), compact_fn(small, x, True, **kwargs))
    assert_close(fn(masked, x, False), compact_fn(small, x, False))
    plain = jax.jit(compact_fn, static_argnums=2)(small, x, False)
    assert_close(fn(masked, x, False), plain)
    assert_close(fn(masked, x, False), jp.compressed(fn)(masked, x, False))
    with pytest.raises(ValueError, match="cannot be traced"):
        jp.trace(fn, params, x, jnp.array(True))


def test_small_parameters_are_checked():
    fn, params, x = build("mlp")
    masks = random_masks(jp.trace(fn, params, x), 0.5)
    compact_fn, _ = jp.compact(fn, params, masks, x)
    with pytest.raises(ValueError, match="small parameters"):
        compact_fn(params, x)


def test_sharded_and_mapped_over_devices():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"])
        mapped = jax.shard_map(
            lambda h, w: jnp.tanh(h @ w) / jax.lax.psum(1, "d"),
            mesh=mesh,
            in_specs=(spec("d"), spec()),
            out_specs=spec("d"),
        )
        return mapped(h, p["b"]) @ p["c"]

    params = randomized({"a": jnp.ones((5, 16)), "b": jnp.ones((16, 8)), "c": jnp.ones((8, 3))})
    x = normal(16, 5)
    graph = jp.trace(fn, params, x)
    assert sorted(group.size for group in graph.groups) == [8, 16]
    masks = random_masks(graph, 0.5)
    compact_fn, small = jp.compact(fn, params, masks, x, verify=True)
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec("d")))
    assert_close(fn(jp.apply_masks(params, masks), x), jax.jit(compact_fn)(small, spread))
    split = jax.device_put(small, jax.sharding.NamedSharding(mesh, spec(None)))
    assert_close(compact_fn(small, x), jax.jit(compact_fn)(split, spread))


def test_cost_with_masks():
    fn, params, x = build("residual")
    graph = jp.trace(fn, params, x)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), flops=0.5)
    compact_fn, small = jp.compact(fn, params, masks, x)
    left, found = graph.cost(masks), jp.trace(compact_fn, small, x).cost()
    assert left.flops == pytest.approx(found.flops, rel=0.01)
    assert left.param_bytes == found.param_bytes
    assert left.flops <= 0.5 * graph.cost().flops


def test_structured_gradual_pruning():
    import optax

    fn, params, x = build("residual")
    graph = jp.trace(fn, params, x)
    pattern = jp.structure.Units(graph, min_units=2)
    schedule = jp.schedules.linear(0.5, end=4)
    tx = jp.optim.gradual(optax.adam(1e-2), schedule, pattern=pattern)
    state, traced = tx.init(params), []

    @jax.jit
    def step(params, state):
        traced.append(1)
        grads = jax.grad(lambda p: jnp.mean(jnp.square(fn(p, x))))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(6):
        params, state = step(params, state)
    assert len(traced) == 1
    masks = jp.optim.get_masks(state)
    gone = graph.removal(masks).units
    assert gone.sum() == round(0.5 * sum(group.size for group in graph.groups))
    assert all((~gone[group.units]).sum() >= 2 for group in graph.groups)
    compact_fn, small = jp.compact(fn, params, masks, x, verify=True)
    assert_close(fn(params, x), compact_fn(small, x))  # training kept the masked weights at zero


def test_isomorphic_scope_keeps_kinds_apart():
    fn, params, x = build("post_norm_encoder")
    graph = jp.trace(fn, params, x)
    scores = jax.tree.map(jnp.abs, params)
    masks = jp.structure.unit_masks(graph, scores, sparsity=0.5, scope="isomorphic")
    gone = graph.removal(masks).units
    by_kind = {}
    for group in graph.groups:
        kind = tuple(sorted({(path.rpartition("/")[2], axis) for path, axis in group.members}))
        by_kind.setdefault(kind, []).append(group)
    assert any(len(groups) > 1 for groups in by_kind.values())
    for groups in by_kind.values():
        size = sum(group.size for group in groups)
        assert abs(sum(gone[group.units].sum() for group in groups) - size / 2) <= len(groups)


def test_bad_masks():
    fn, params, x = build("mlp")
    with pytest.raises(ValueError, match="masks"):
        jp.compact(fn, params, {"w": jnp.ones(3, bool)}, x)
    nothing = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
    with pytest.raises(ValueError, match="nothing of the inputs reaches"):
        jp.compact(fn, params, nothing, x)
