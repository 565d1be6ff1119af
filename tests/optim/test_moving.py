"""One contract for every transform whose masks move, around any optimizer."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.optim._optimizers import OPTIMIZERS

KEY = jax.random.key(3)
MOVES = {"key": KEY, "every": 2, "drop": 0.5}
SPARSE = {
    "static_random": lambda tx, s, **k: jp.optim.static_random(tx, s, key=KEY, **k),
    "set_": lambda tx, s, **k: jp.optim.set_(tx, s, **MOVES, **k),
    "rigl": lambda tx, s, **k: jp.optim.rigl(tx, s, **MOVES, **k),
    "ac_dc": lambda tx, s, **k: jp.optim.ac_dc(
        tx, s, begin=1, end=5, sparse_steps=1, dense_steps=1, **{"scope": "leaf", **k}
    ),
    "gradual": lambda tx, s, **k: jp.optim.gradual(
        tx, jp.schedules.linear(s, end=4), **{"scope": "leaf", **k}
    ),
    "growing": lambda tx, s, **k: jp.optim.growing(
        tx, s, growth=0.2, every=1, pick=0.3, **{"scope": "leaf", **k}
    ),
    "gradual of powerprop": lambda tx, s, **k: jp.optim.gradual(
        jp.optim.powerprop(tx, 2.0), jp.schedules.linear(s, end=4), **{"scope": "leaf", **k}
    ),
}
FORWARD = {
    "straight_through": lambda tx, s, **k: jp.optim.straight_through(tx, s, decay=1e-2, **k),
    "random": lambda tx, s, **k: jp.optim.straight_through(tx, s, key=KEY, **k),
    "top_kast": lambda tx, s, **k: jp.optim.top_kast(tx, s, backward_sparsity=s / 2, every=2, **k),
    "movement": lambda tx, s, **k: jp.optim.movement(
        tx, jp.schedules.one_shot(s, at=1), **{"scope": "leaf", **k}
    ),
}
# each layer finds its own sparsity
OWN = {
    "soft_threshold": lambda tx, s, **k: jp.optim.soft_threshold(tx, initial=0.0, **k),
    "spartan": lambda tx, s, **k: jp.optim.spartan(tx, s, sharpness=3.0, **k),
    "learned_nm": lambda tx, s, **k: jp.optim.learned_nm(
        tx, jp.masks.NM(2, 4, axis=0), key=KEY, logits=optax.adam(0.1), **k
    ),
}
ALL = SPARSE | FORWARD
MAKE = ALL | OWN
# the others of a family take the same paths
QUICK = ("rigl", "gradual", "straight_through", "movement")
LATE = ()
SLOW = pytest.mark.slow
EVERY = [n if n in QUICK else pytest.param(n, marks=SLOW) for n in ALL]
HELD = [*EVERY, *(pytest.param(n, marks=SLOW) if n in LATE else n for n in OWN)]
FEW = ["sgd", "adamw", "adafactor", "lamb", "contrib.schedule_free_sgd", "contrib.muon"]
PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (8, 16)),
    "v": jax.random.normal(jax.random.key(1), (16, 4)),
    "b": jnp.ones(4),
}


def loss(params):
    return sum(jnp.sum(jnp.sin(x * 1.3 + 1)) for x in jax.tree.leaves(params))


def train(tx, params, steps=7, *, state=None):
    """Parameters and state after some steps, and for each whether pruned weights came back."""

    @jax.jit
    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(jp.optim.sparse_params(state, params))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        sparse = jp.optim.sparse_params(state, params)
        off = [jnp.any(~m & (p != 0)) for p, m in zip(*both(params, state), strict=True)]
        return (params, state), (jnp.any(jnp.stack(off)), jp.sparsity(sparse))

    carry = params, tx.init(params) if state is None else state
    return jax.lax.scan(step, carry, None, length=steps)


def both(params, state):
    return jax.tree.leaves(params), jax.tree.leaves(jp.optim.get_masks(state))


@pytest.mark.parametrize("optimizer", [FEW[1], *(pytest.param(n, marks=SLOW) for n in FEW)])
@pytest.mark.parametrize("name", SPARSE)
def test_pruned_weights_are_zero_around_any_optimizer(name, optimizer):
    (params, state), (revived, _) = train(SPARSE[name](OPTIMIZERS[optimizer](), 0.75), PARAMS)
    assert not np.any(revived)
    assert jp.sparsity(jp.optim.get_masks(state)) == 0.75
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert jp.sparsity(params) >= 0.75


@pytest.mark.parametrize("name", FORWARD)
def test_the_forward_pass_is_sparse_and_the_weights_are_not(name):
    (params, state), (_, sparsity) = train(FORWARD[name](optax.adam(0.1), 0.75), PARAMS)
    assert jp.sparsity(params) == 0
    np.testing.assert_allclose(sparsity[1:], 0.75, atol=1e-6)
    with pytest.raises(ValueError, match="sparse_params"):
        jp.optim.check(state, params)
    with pytest.raises(ValueError, match="masked_update"):
        jp.optim.replace_masks(state, jp.optim.get_masks(state))


@pytest.mark.parametrize("name", HELD)
def test_states_are_saved_resumed_donated_and_mapped(name):
    tx = MAKE[name](optax.adam(0.1), 0.5)
    (params, state), _ = train(tx, PARAMS, 3)
    back = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
    leaves, treedef = jax.tree.flatten(back)
    back = treedef.unflatten([jnp.array(x, copy=True) for x in leaves])
    (whole, _), _ = train(tx, params, 4, state=state)
    step = jax.jit(lambda p, s: train(tx, p, 4, state=s)[0][0], donate_argnums=(0, 1))
    resumed = step(jax.tree.map(jnp.copy, params), back)
    chex.assert_trees_all_close(resumed, whole, rtol=1e-6)
    doubled = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert state.step == 3


@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("name", MAKE)
def test_a_state_may_be_donated_as_init_gives_it(name, scope):
    """No buffer is in it twice, and none is the caller's."""
    if name in ("soft_threshold", "learned_nm") and scope == "global":
        return
    scopes = {} if name in ("soft_threshold", "learned_nm") else {"scope": scope}
    state = MAKE[name](optax.adam(0.1), 0.5, **scopes).init(PARAMS)
    held = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, PARAMS))]
    assert len(set(held)) == len(held)


@pytest.mark.parametrize("name", HELD)
def test_runs_on_eight_devices_as_on_one(name):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    put = lambda x: jax.device_put(x, sharding) if x.ndim == 2 else x
    tx = MAKE[name](optax.adam(0.1), 0.5)
    (one, first), _ = train(tx, PARAMS)
    spread = jax.tree.map(put, PARAMS)
    begun = tx.init(spread)
    assert jp.optim.get_masks(begun)["w"].sharding.is_equivalent_to(sharding, 2)
    (many, state), _ = train(tx, spread, state=begun)
    chex.assert_trees_all_equal(jp.optim.get_masks(state), jp.optim.get_masks(first))
    chex.assert_trees_all_close(many, one, rtol=1e-5)
    assert jp.optim.get_masks(state)["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("name", EVERY)
def test_patterns_and_half_precision(name):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = ALL[name](optax.adam(0.1), 0.5, pattern=jp.masks.NM(2, 4, axis=-1), where="w|v")
    (params, state), _ = train(tx, low)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    for path in ("w", "v"):
        groups = np.asarray(jp.optim.get_masks(state)[path]).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("pattern", [jp.masks.Block((2, 2)), jp.masks.Channel(-1)], ids=str)
def test_blocks_and_channels(name, pattern):
    (params, state), _ = train(ALL[name](optax.adam(0.1), 0.5, pattern=pattern), PARAMS)
    masks = jp.optim.get_masks(state)
    assert jp.sparsity(masks) == 0.5
    assert jp.sparsity(jp.optim.sparse_params(state, params), where="w|v") >= 0.5
    unit = np.asarray(jnp.broadcast_to(masks["w"], (8, 16)))
    if isinstance(pattern, jp.masks.Block):
        unit = unit.reshape(4, 2, 8, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    assert ((unit == unit[..., :1]) if unit.shape[-1] == 4 else (unit == unit[:1])).all()


@pytest.mark.parametrize("name", HELD)
def test_nnx_optimizer(name):
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, MAKE[name](optax.adam(0.1), 0.5), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean(jnp.square(m(x) - 1)))(model)
        optimizer.update(model, grads)

    for _ in range(6):
        step(model, optimizer, jnp.ones((2, 8)))
    masks = jp.optim.get_masks(nnx.as_pure(optimizer.opt_state))
    assert jp.sparsity(masks) == 0.5 if name in ALL else 0 < jp.sparsity(masks) < 1


@pytest.mark.parametrize("optimizer", [FEW[1], *(pytest.param(n, marks=SLOW) for n in FEW)])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=SLOW)], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_what_finds_its_own_sparsity_trains_under_any_optimizer(name, optimizer, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    tx = OWN[name](OPTIMIZERS[optimizer](), 0.5)
    (trained, state), (_, sparsity) = train(tx, params)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype(dtype)}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trained))
    assert all(not np.array_equal(trained[k], params[k]) for k in params)
    seen = jp.optim.sparse_params(state, trained)
    if name == "learned_nm":  # its forward passes are draws, soft ones
        seen = jp.apply_masks(trained, jp.optim.get_masks(state))
        sparsity = [jp.sparsity(jp.optim.get_masks(state))]
    kept = jax.tree.map(lambda x: x != 0, seen)
    for k in "wv":
        np.testing.assert_array_equal(jp.optim.get_masks(state)[k], kept[k])
    assert 0 < sparsity[-1] < 1


@pytest.mark.parametrize("name", ["set_", "rigl"])
def test_what_comes_back_starts_anew(name):
    tx = SPARSE[name](optax.adam(0.1), 0.5)
    (params, state), _ = train(tx, PARAMS, 2)  # step 2 moves masks
    old = jp.optim.get_masks(state)
    grads = jax.grad(loss)(params)
    updates, after = tx.update(grads, state, params)
    new, trained = jp.optim.get_masks(after), optax.apply_updates(params, updates)
    mu, before = (optax.tree.get(s, "mu")["w"] for s in (after, state))
    back, stays = new["w"] & ~old["w"], new["w"] & old["w"]
    assert back.any()
    assert (old["w"] & ~new["w"]).any()
    assert not np.any(mu[~stays])
    assert not np.any(trained["w"][back])
    np.testing.assert_array_equal(mu[stays], before[stays])
    np.testing.assert_array_equal(trained["w"][stays], params["w"][stays])
    np.testing.assert_array_equal(trained["b"], params["b"])  # no gradient in such a step
    assert after.changes.regrown == after.changes.dropped > 0
    planted = SPARSE[name](optax.adam(0.1), 0.5, fresh=jax.nn.initializers.ones)
    updates, after = planted.update(grads, state, params)
    assert (optax.apply_updates(params, updates)["w"][back] == 1).all()


def test_gradients_decide_what_rigl_grows():
    tx = jp.optim.rigl(optax.sgd(0.1), 0.5, key=KEY, drop=0.25)
    state = tx.init(PARAMS)
    old = jp.optim.get_masks(state)["w"]
    params = jp.apply_masks(PARAMS, jp.optim.get_masks(state))
    wanted = jnp.argwhere(~old)[7]
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    grads["w"] = grads["w"].at[tuple(wanted)].set(-9.0)
    _, state = tx.update(grads, state, params)
    assert jp.optim.get_masks(state)["w"][tuple(wanted)]


def test_dense_phases_of_ac_dc_start_without_momentum():
    tx = SPARSE["ac_dc"](optax.adam(0.1), 0.5)
    (params, state), _ = train(tx, PARAMS, 2)  # step 1 was sparse, step 2 is dense
    pruned = ~jp.optim.get_masks(state)["w"]
    _, after = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert jp.optim.get_masks(after)["w"].all()
    assert not np.any(optax.tree.get(after, "mu")["w"][pruned])
    assert np.any(optax.tree.get(after, "mu")["w"][~pruned])


def test_metrics_name_what_masks_do():
    tx = SPARSE["rigl"](optax.sgd(0.1), 0.5)
    first = jp.optim.get_masks(tx.init(PARAMS))
    (_, state), _ = train(tx, PARAMS, 3)
    found = jax.jit(lambda s: jp.optim.metrics(s, since=first, per_leaf=True))(state)
    now = jp.optim.get_masks(state)
    same = sum(int((first[k] & now[k]).sum()) for k in "wv")
    assert found["masks/overlap"] == pytest.approx(same / 96)
    assert found["masks/moves"] == 2
    assert found["masks/last_move"] == 2
    assert found["masks/churn"] == pytest.approx(found["masks/regrown"] / 96)
    assert found["masks/sparsity/w"] == 0.5
    assert found["masks/sparsity"] == 0.5
    masks = {"w": jnp.ones((2, 3), bool).at[:, 1].set(False)}
    fixed = jp.masked_update(optax.sgd(0.1), masks).init({"w": jnp.ones((2, 3))})
    assert jp.optim.metrics(fixed)["masks/dead_units"] == 1


def test_bad_input():
    sgd = optax.sgd(0.1)
    with pytest.raises(ValueError, match="falls from 0.5 at step 1"):
        jp.optim.gradual(sgd, jp.schedules.one_shot(0.2, at=2, initial=0.5))
    with pytest.raises(ValueError, match="never move"):
        jp.optim.rigl(sgd, 0.5, key=KEY, every=100, begin=10, end=90)
    with pytest.raises(ValueError, match="removes at most 0.5"):
        jp.optim.rigl(sgd, 0.9, key=KEY, pattern=jp.masks.NM(2, 4)).init(PARAMS)
    with pytest.raises(ValueError, match="backward_sparsity"):
        jp.optim.top_kast(sgd, 0.5, backward_sparsity=0.9)
    with pytest.raises(ValueError, match="axis 3"):
        jp.optim.set_(sgd, 0.5, key=KEY, pattern=jp.masks.Channel(3)).init(PARAMS)
    with pytest.raises(ValueError, match="threshold"):
        jp.optim.movement(sgd, 0.5, method="soft", pattern=jp.masks.NM(2, 4))
    for name, make in MAKE.items():
        tx = make(sgd, 0.5)
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match="tx.update"):
            tx.update(PARAMS, state)
        other = dict(PARAMS, w=jnp.ones((3, 5)))
        with pytest.raises(ValueError, match="masks in opt_state"):
            tx.update(other, state, other)
        with pytest.raises(ValueError, match="selects no leaf"):
            tx.init({"b": jnp.ones(3)})
        assert name
