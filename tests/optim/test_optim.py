"""One contract for both transforms: pruned weights are exactly zero in any stock loop."""

import chex
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
    for scores in (jp.scores.magnitude, jp.scores.taylor, jp.scores.movement, jp.scores.lamp):
        for scope in ("global", "leaf"):
            tx = jp.optim.gradual(
                optax.sgd(0.1), jp.schedules.one_shot(0.5, at=1), scores=scores, scope=scope
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
