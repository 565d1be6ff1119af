"""One contract for both transforms: pruned weights are exactly zero in any stock loop."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp

HALF = lambda p: jp.prune_tree(p, 0.5)[1]
WRAPPERS = {
    "fixed": lambda inner: jp.masked_update(inner, HALF),
    "packed": lambda inner: jp.masked_update(inner, HALF, packed=True),
    "gradual": lambda inner: jp.optim.gradual(inner, jp.schedules.linear(0.5, end=3)),
}
INNERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lamb": lambda: optax.lamb(0.1),
    "adafactor": lambda: optax.adafactor(0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
}


def loss(params):
    return sum(jnp.sum(jnp.sin(x + 1)) for x in jax.tree.leaves(params))


def steps(tx, params, n):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(n):
        params, state = step(params, state)
    return params, state


def assert_zero(params, masks):
    jax.tree.map(
        lambda p, m: np.testing.assert_array_equal(jnp.where(m, 0, p), jnp.zeros_like(p)),
        params,
        masks,
    )


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_pruned_weights_are_exactly_zero(wrapper, inner, params):
    tx = WRAPPERS[wrapper](INNERS[inner]())
    trained, state = steps(tx, params, 5)
    masks = jp.optim.get_masks(state)
    assert jp.sparsity(masks) == pytest.approx(0.5, abs=0.01)
    assert_zero(trained, masks)
    assert jp.sparsity(trained) == pytest.approx(jp.sparsity(masks), abs=1e-6)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(trained))


@pytest.mark.parametrize("wrapper", ["fixed", "gradual"])
def test_dtypes_and_containers(wrapper, params, container):
    low = container(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    trained, state = steps(WRAPPERS[wrapper](optax.adam(0.1)), low, 5)
    assert jax.tree.structure(trained) == jax.tree.structure(low)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype(jnp.bfloat16)}
    assert_zero(trained, jp.optim.get_masks(state))


def test_kept_weights_train_as_without_masks(params):
    """With a per-weight optimizer, what is kept sees no difference from dense training."""
    tx = jp.masked_update(optax.adam(0.1), HALF)
    trained, state = steps(tx, params, 4)
    dense, _ = steps(optax.adam(0.1), params, 4)
    masks = jp.optim.get_masks(state)
    jax.tree.map(
        lambda a, b, m: np.testing.assert_allclose(a * m, b * m, rtol=1e-5, atol=1e-6),
        trained,
        dense,
        masks,
    )


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_moments_see_no_pruned_gradient(wrapper, params):
    _, state = steps(WRAPPERS[wrapper](optax.adam(0.1)), params, 1)
    if wrapper == "gradual":
        return  # nothing is pruned at step 0
    adam = state.inner_state[0]
    assert_zero(adam.mu, jp.optim.get_masks(state))
    assert_zero(adam.nu, jp.optim.get_masks(state))


def test_state_owns_its_masks(params):
    masks = HALF(params)
    tx = jp.masked_update(optax.sgd(0.1), masks)
    state = tx.init(params)

    @jax.jit
    def touch(state):
        return jax.tree.map(lambda x: x ^ True if x.dtype == bool else x, state)

    jax.jit(touch, donate_argnums=0)(state)
    assert all(bool(jnp.any(m)) for m in jax.tree.leaves(masks))  # still readable


def test_packed_state_is_an_eighth():
    params = {"w": jnp.ones((64, 64))}
    byte = jp.masked_update(optax.sgd(0.1), HALF).init(params)
    bit = jp.masked_update(optax.sgd(0.1), HALF, packed=True).init(params)
    assert jp.nbytes(byte.masks) == 64 * 64
    assert jp.nbytes(bit.masks) == 64 * 64 // 8


def test_train_state_loop(params):
    state = TrainState.create(apply_fn=None, params=params, tx=WRAPPERS["gradual"](optax.adam(0.1)))
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    for _ in range(5):
        state = step(state)
    assert jp.sparsity(state.params) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_nnx_optimizer_loop(wrapper):
    model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, WRAPPERS[wrapper](optax.adam(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean(jnp.square(m(x) - 1)))(model)
        optimizer.update(model, grads)

    for _ in range(5):
        step(model, optimizer, jnp.ones((2, 8)))
    assert jp.sparsity(nnx.state(model, nnx.Param)) == pytest.approx(0.5, abs=0.01)


def test_gradual_follows_the_schedule(params):
    schedule = jp.schedules.cubic(0.8, begin=2, end=10, every=2)
    tx = jp.optim.gradual(optax.sgd(0.0), schedule)
    state, seen, before = tx.init(params), [], None
    for i in range(14):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
        masks = jp.optim.get_masks(state)
        assert jp.sparsity(masks) == pytest.approx(float(schedule(i)), abs=2e-3)
        assert_zero(params, masks)
        if before is not None:  # what is pruned stays pruned
            jax.tree.map(
                lambda old, new: np.testing.assert_array_equal(new & ~old, False), before, masks
            )
        before = masks
        seen.append(jp.sparsity(masks))
    assert len(set(seen)) == 5


def test_gradual_leaves_masks_alone_between_changes(params):
    calls = []

    def counting(params):
        jax.debug.callback(lambda: calls.append(1))
        return jp.scores.magnitude(params)

    tx = jp.optim.gradual(optax.sgd(0.1), jp.schedules.linear(0.5, end=8, every=4), scores=counting)
    _, _ = steps(tx, params, 20)
    jax.effects_barrier()
    assert len(calls) == 2  # at steps 4 and 8


def test_gradual_with_any_score_pattern_and_scope(params):
    scores = (jp.scores.magnitude, jp.scores.taylor, jp.scores.movement, jp.scores.lamp)
    for score, scope in zip(scores, ("leaf", "global", "leaf", "global"), strict=True):
        tx = jp.optim.gradual(
            optax.sgd(0.1), jp.schedules.one_shot(0.5, at=1), scores=score, scope=scope
        )
        trained, state = steps(tx, params, 3)
        assert jp.sparsity(jp.optim.get_masks(state)) == pytest.approx(0.5, abs=0.02)
        assert_zero(trained, jp.optim.get_masks(state))
    for pattern, sparsity in (
        (jp.masks.NM(2, 4), 0.5),
        (jp.masks.Block((2, 2)), 0.5),
        (jp.masks.Channel(-1), 0.5),
    ):
        tx = jp.optim.gradual(
            optax.sgd(0.1),
            jp.schedules.linear(sparsity, end=2),
            pattern=pattern,
            where="dense/kernel",
        )
        trained, _ = steps(tx, params, 4)
        assert jp.sparsity(trained, where="dense/kernel") == pytest.approx(0.5)
        assert jp.sparsity(trained, where="conv/kernel") == 0
        if isinstance(pattern, jp.masks.NM):
            groups = np.asarray(trained["dense"]["kernel"] != 0).T.reshape(-1, 4)
            assert (groups.sum(1) == 2).all()


def test_replace_masks(params):
    tx = optax.chain(optax.clip(1.0), jp.masked_update(optax.sgd(0.1), HALF, packed=True))
    state = tx.init(params)
    other = jax.tree.map(lambda m: ~m if m.ndim else m, jp.optim.get_masks(state))
    replaced = jp.optim.replace_masks(state, other)
    assert jax.tree.structure(replaced) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, jp.optim.get_masks(replaced), other)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), replaced, params)
    assert_zero(optax.apply_updates(params, updates), other)
    with pytest.raises(ValueError, match="found 0"):
        jp.optim.get_masks(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="missing"):
        jp.optim.replace_masks(state, {"embed": other["embed"]})


def test_extra_arguments_reach_the_inner_transform(params):
    tx = jp.masked_update(optax.contrib.reduce_on_plateau(), HALF)
    state = tx.init(params)
    _, state = tx.update(params, state, params, value=jnp.array(1.0))
    assert state.inner_state.best_value == 1.0


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_round_trips_through_orbax(wrapper, params, tmp_path):
    _, state = steps(WRAPPERS[wrapper](optax.adam(0.1)), params, 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", state)
    chex.assert_trees_all_equal(back, state)
    jp.export.save(tmp_path / "own", state)
    loaded = jp.export.load(tmp_path / "own")
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    chex.assert_trees_all_equal(loaded, state)


@pytest.mark.parametrize("wrapper", ["fixed", "gradual"])
def test_state_shards_with_params(wrapper):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    params = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (16, 8)), sharding)}
    trained, state = steps(WRAPPERS[wrapper](optax.adam(0.1)), params, 5)
    assert trained["w"].sharding.is_equivalent_to(sharding, 2)
    assert jp.optim.get_masks(state)["w"].sharding.is_equivalent_to(sharding, 2)
    assert jp.sparsity(trained) == 0.5


def test_scan_over_steps(params):
    tx = WRAPPERS["gradual"](optax.adam(0.1))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=5)
    looped, _ = steps(tx, params, 5)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_states_under_optax_and_flax(wrapper, params):
    """`map_params`, `tree.get` and `flax.serialization`, alone and behind `multi_transform`."""
    alone = WRAPPERS[wrapper](optax.adam(0.1))
    labels = {"conv": "x", "dense": "x", "embed": "y"}
    parts = optax.multi_transform({"x": alone, "y": optax.sgd(0.1)}, labels)
    for tx in (alone, parts):
        _, state = steps(tx, params, 3)
        doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
        assert jax.tree.structure(doubled) == jax.tree.structure(state)
        mu, twice = (optax.tree.get(s, "mu") for s in (state, doubled))
        chex.assert_trees_all_close(twice, jax.tree.map(lambda x: 2 * x, mu))
        assert optax.tree.get(state, "count") == 3
        back = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
        chex.assert_trees_all_equal(back, state)


def test_packed_masks_of_other_parameters_are_refused():
    state = jp.masked_update(optax.sgd(0.1), HALF, packed=True).init({"w": jnp.ones((4, 4))})
    data = flax.serialization.to_bytes(state)
    for other in ({"w": jnp.ones((5, 4))}, {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}):
        tx = jp.masked_update(optax.sgd(0.1), HALF, packed=True)
        with pytest.raises(ValueError, match="same parameters"):
            flax.serialization.from_bytes(tx.init(other), data)


@pytest.mark.parametrize("inner", ["sgd", "adam", "chain"])
def test_regrown_weights_start_anew(inner, params):
    """Their moments are those of a weight that has always been zero."""
    tx = jp.masked_update(INNERS[inner](), HALF)
    trained, state = steps(tx, params, 3)
    masks = jp.optim.get_masks(state)
    swapped = jax.tree.map(lambda m: ~m if m.ndim else m, masks)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = jp.optim.replace_masks(state, swapped)
    _, state = tx.update(zeros, state, trained)
    moments = [x for x in jax.tree.leaves(state.inner_state) if jnp.shape(x) == (16, 10)]
    assert moments
    state = jp.optim.replace_masks(state, masks)
    _, state = tx.update(zeros, state, jax.tree.map(jnp.zeros_like, trained))
    moments = [x for x in jax.tree.leaves(state.inner_state) if jnp.shape(x) == (16, 10)]
    for moment in moments:  # all were pruned once
        np.testing.assert_array_equal(moment, 0)


def test_gradual_drops_momenta_of_what_it_prunes(params):
    tx = jp.optim.gradual(optax.sgd(0.1, momentum=0.9), jp.schedules.one_shot(0.5, at=2))
    trained, state = steps(tx, params, 3)
    assert_zero(optax.tree.get(state, "trace"), jp.optim.get_masks(state))
    assert jp.sparsity(trained) == pytest.approx(0.5, abs=0.01)


def test_evaluation_weights_and_distances_are_masked(params):
    tx = jp.masked_update(optax.contrib.schedule_free_sgd(0.1), HALF)
    trained, state = steps(tx, params, 3)
    masks = jp.optim.get_masks(state)
    assert_zero(optax.contrib.schedule_free_eval_params(state.inner_state, trained), masks)
    _, state = steps(jp.masked_update(optax.contrib.dog(1.0), HALF), params, 3)
    assert_zero(optax.tree.get(state, "init_params"), masks)


def test_lookahead_keeps_both_copies(params):
    pair = optax.LookaheadParams.init_synced(params)
    for packed in (False, True):
        tx = jp.masked_update(optax.lookahead(optax.adam(0.1), 2, 0.5), HALF(params), packed=packed)
        state = tx.init(pair)
        trained = pair
        for _ in range(3):
            updates, state = tx.update(params, state, trained)
            trained = optax.apply_updates(trained, updates)
        assert_zero(trained.fast, HALF(params))
        assert_zero(trained.slow, HALF(params))
        jp.optim.check(state, trained)


def test_flattened_masks():
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2)), "c": jnp.ones(2)}
    masks = {"a": jnp.array(True), "b": jnp.eye(2, dtype=bool), "c": jnp.array([True, False])}
    tx = optax.flatten(jp.masked_update(optax.sgd(0.1), masks))
    trained, state = steps(tx, params, 2)
    assert_zero(trained, masks)
    assert jax.tree.map(int, jp.optim.check(state, trained)) == {"a": 0, "b": 0, "c": 0}
    masks["c"] = jnp.array(True)  # where do its entries end?
    with pytest.raises(ValueError, match=r"masked_update\(optax.flatten"):
        optax.flatten(jp.masked_update(optax.sgd(0.1), masks)).init(params)


def test_check_finds_what_came_back(params):
    masks = HALF(params)
    tx = optax.chain(jp.masked_update(optax.scale_by_adam(), masks), optax.scale(-0.1))
    trained, state = steps(tx, params, 2)
    pruned = int(jnp.sum(~masks["dense"]["kernel"]))
    with pytest.raises(ValueError, match=r"leaf 'conv/kernel' are not zero, and some of 2 more"):
        jp.optim.check(state, trained)
    counts = jax.jit(jp.optim.check)(state, trained)
    assert counts["dense"]["kernel"] == pruned
    assert counts["dense"]["bias"] == 0
    cured = jp.apply_masks(trained, masks)
    assert not any(jax.tree.leaves(jp.optim.check(state, cured)))
    cured["embed"] = jnp.where(masks["embed"], cured["embed"], jnp.nan)
    with pytest.raises(ValueError, match="'embed'"):
        jp.optim.check(state, cured)
    with pytest.raises(ValueError, match="unexpected 'conv/bias'"):
        jp.optim.check(state, {"embed": params["embed"]})


@pytest.mark.parametrize(
    ("compress", "cure"),
    [
        (lambda p: jp.quantize_tree(p, 8), "jp.optim.trainable"),
        (lambda p: jp.cluster_tree(p, bits=2), "jp.optim.trainable"),
        (lambda p: jp.qat.prepare(p, 8), r"jp.qat.prepare\(params, masks=masks\)"),
    ],
)
def test_compressed_leaves_are_refused_with_the_cure(compress, cure, params):
    tree = compress(params)
    for tx in (
        jp.masked_update(optax.sgd(0.1), HALF(params)),
        jp.optim.gradual(optax.sgd(0.1), jp.schedules.linear(0.5, end=2)),
        jp.optim.clustered(optax.sgd(0.1)),
    ):
        with pytest.raises(TypeError, match=f"'conv/kernel'.*{cure}"):
            tx.init(tree)
    kept = jax.tree.map(lambda m: jnp.array(True), HALF(params))
    jp.masked_update(optax.set_to_zero(), kept).init(tree)  # nothing of them is masked


def test_weights_that_no_update_makes_zero_are_named():
    masks = {"w": jnp.array([True, False])}
    tx = jp.masked_update(optax.sgd(0.1), masks)
    for value in (jnp.inf, -jnp.inf, jnp.nan):
        with pytest.raises(ValueError, match="'w' is infinite or NaN"):
            tx.init({"w": jnp.array([1.0, value])})
        tx.init({"w": jnp.array([value, 1.0])})
    with pytest.raises(TypeError, match="'w' has dtype int32"):
        tx.init({"w": jnp.array([1, 2])})


def test_min_keep():
    params = {"a": jnp.arange(1.0, 5).reshape(2, 2), "b": jnp.ones((1, 1))}
    _, masks = jp.prune_tree(params, 0.9, scope="leaf")
    assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [0, 0]
    _, masks = jp.prune_tree(params, 0.9, scope="leaf", min_keep=1)
    assert masks["a"].tolist() == [[False, False], [False, True]]
    assert masks["b"].all()
    _, masks = jp.prune_tree(params, {"a": 0.9, "b": 1.0}, min_keep=2)
    assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [2, 1]
    tx = jp.optim.gradual(optax.sgd(0.1), lambda _: 1.0, scope="leaf", min_keep=1)
    trained, _ = steps(tx, params, 2)
    assert [int(jnp.sum(x != 0)) for x in jax.tree.leaves(trained)] == [1, 1]
    with pytest.raises(ValueError, match='min_keep.*scope="leaf"'):
        jp.prune_tree(params, 0.5, min_keep=1)


def test_clustered_follows_wide_parameters():
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))}
        tx = jp.optim.clustered(optax.sgd(0.1), bits=2)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        assert params["w"].dtype == jnp.float64
        assert jnp.unique(params["w"]).size == 4


def test_bad_input(params):
    tx = jp.masked_update(optax.sgd(0.1), {"w": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="missing"):
        tx.init(params)
    tx = jp.optim.gradual(optax.sgd(0.1), jp.schedules.linear(0.5, end=2))
    with pytest.raises(ValueError, match="tx.update"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="schedule"):
        jp.optim.gradual(optax.sgd(0.1), 0.5)
    with pytest.raises(ValueError, match="nearest"):
        jp.optim.gradual(optax.sgd(0.1), lambda _: 0.5, where="embd").init(params)
    with pytest.raises(ValueError, match="selects no leaf"):
        jp.optim.gradual(optax.sgd(0.1), lambda _: 0.5).init({"b": jnp.ones(3)})
