"""Captures, objectives, recovery and precomputed teachers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxprune as jp
from tests.structure._zoo import normal


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(6, (3, 3), name="second")(x))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


def linen():
    x = normal(2, 8, 8, 3)
    return Net(), Net().init(jax.random.key(0), x), x


def test_capture_by_parameter_scope_and_operation():
    net, params, x = linen()
    apply = net.apply
    out, found = jp.distill.capture(
        apply,
        params,
        x,
        at={
            "conv": "params/first/kernel",
            "biased": "params/first/bias",
            "scope": "scope:Net/second",
        },
    )
    np.testing.assert_allclose(out, apply(params, x), rtol=1e-5, atol=1e-6)
    _, inner = net.apply(params, x, capture_intermediates=True)
    wanted = inner["intermediates"]
    np.testing.assert_allclose(
        found["biased"], wanted["first"]["__call__"][0], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        found["scope"], wanted["second"]["__call__"][0], rtol=1e-5, atol=1e-5
    )
    assert found["conv"].shape == (2, 8, 8, 8)
    many = jp.distill.capture(apply, params, x, at=r"params/.*/kernel")[1]
    assert set(many) == {f"params/{n}/kernel" for n in ("first", "second", "head")}
    listed = jp.distill.sites(apply, params, x)
    assert {"param:params/head/bias", "scope:Net/first", "op:dot_general/0"} <= set(listed)


def test_capture_in_nnx_raw_jax_names_and_gradients():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    fn = lambda state, x: jnp.tanh(nnx.merge(graphdef, state)(x))
    x = normal(5, 3)
    _, found = jp.distill.capture(fn, state, x, at={"h": "kernel", "t": "op:tanh/0"})
    np.testing.assert_allclose(found["h"], x @ model.kernel[...], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["t"], fn(state, x), rtol=1e-5)

    def raw(p, x):
        h = checkpoint_name(jnp.sin(x @ p["w"]), "hidden")
        return jnp.sum(h**2)

    params = {"w": normal(3, 4)}
    loss = lambda p: jnp.sum(jp.distill.capture(raw, p, x, at="hidden")[1]["hidden"] ** 3)
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(params)["w"],
        jax.grad(lambda p: jnp.sum(jnp.sin(x @ p["w"]) ** 3))(params)["w"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_capture_in_loops_stacks_turns():
    def fn(p, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(body, x, p["layers"])[0]

    params, x = {"layers": normal(3, 4, 4)}, normal(2, 4)
    out, found = jp.distill.capture(fn, params, x, at={"pre": "layers", "post": "op:tanh/0"})
    assert found["pre"].shape == (3, 2, 4)
    np.testing.assert_allclose(found["post"][-1], out, rtol=1e-6)
    np.testing.assert_allclose(found["pre"][0], x @ params["layers"][0], rtol=1e-5, atol=1e-6)


def test_capture_on_compacted_students():
    net, params, x = linen()
    graph = jp.trace(net.apply, params, x)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5)
    compact_fn, small = jp.compact(net.apply, params, masks, x)
    out, found = jp.distill.capture(compact_fn, small, x, at={"h": "params/second/kernel"})
    np.testing.assert_allclose(out, compact_fn(small, x), rtol=1e-5, atol=1e-6)
    assert found["h"].shape[-1] == small["params"]["second"]["kernel"].shape[-1]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("params/frist/kernel", "params/first/kernel"),
        ("scope:Nett", "scope:Net"),
        ({"x": ".*kernel"}, "matches 3 values"),
        ("op:(", "no regular expression"),
    ],
)
def test_captures_that_match_nothing(at, message):
    net, params, x = linen()
    with pytest.raises(ValueError, match=message):
        jp.distill.capture(net.apply, params, x, at=at)


def test_objective_adds_up_and_stops_the_teacher():
    net, params, x = linen()
    other = Net().init(jax.random.key(1), x)
    labels = jnp.array([1, 3])
    soft = lambda s, t, batch: jp.distill.kd(s.out, t.out, temperature=2.0)
    feature = lambda s, t, batch: jp.distill.hint(s.at["h"], t.at["h"])
    hard = lambda out, batch: optax.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()
    at = {"h": "params/second/kernel"}
    loss_fn = jp.distill.objective(
        net.apply,
        net.apply,
        {"kd": (0.5, soft), "hint": (2.0, feature)},
        task=hard,
        task_weight=0.1,
        student_at=at,
        teacher_at=at,
    )
    (loss, aux), grads = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(
        params, other, (x, labels)
    )
    np.testing.assert_allclose(
        loss, 0.1 * aux["task"] + 0.5 * aux["kd"] + 2 * aux["hint"], rtol=1e-5
    )
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[1])) == 0
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[0])) > 0
    # a teacher in few bits
    plain = jp.distill.objective(net.apply, net.apply, {"kd": (1.0, soft)})
    small = jp.quantize_tree(other, bits=8)
    found = plain(params, small, (x, labels))[0]
    np.testing.assert_allclose(found, plain(params, other, (x, labels))[0], rtol=0.1)
    with pytest.raises(ValueError, match="at least one"):
        jp.distill.objective(net.apply, net.apply, {})
    with pytest.raises(ValueError, match="precomputed"):
        jp.distill.objective(net.apply, None, {"kd": (1.0, soft)})


def test_objective_with_projectors_keys_and_precomputed_outputs():
    fn = lambda p, x, key=None: x @ p + (0 if key is None else jax.random.normal(key, (3, 4)))
    project = jp.distill.dense_projector(4, 6)
    extra = project.init(jax.random.key(0))
    term = lambda s, t, batch, extra: jp.distill.hint(project.apply(extra, s.out), t.out)
    loss_fn = jp.distill.objective(
        fn,
        None,
        {"hint": (1.0, term)},
        precomputed=lambda batch: batch["t"],
        inputs=lambda b: b["x"],
    )
    batch = {"x": normal(3, 5), "t": normal(3, 6)}
    p = normal(5, 4)
    quiet = loss_fn(p, None, batch, None, extra)[0]
    loud = loss_fn(p, None, batch, jax.random.key(1), extra)[0]
    assert quiet != loud


SLOW = ["quantize", "qat", "clusters", "factors"]


@pytest.mark.parametrize(
    "how", ["compact", "masks", *(pytest.param(how, marks=pytest.mark.slow) for how in SLOW)]
)
def test_recover(how):
    dense = {
        "w1": normal(12, 32) / 3,
        "b1": jnp.zeros(32),
        "w2": normal(32, 6) / 5,
        "b2": jnp.zeros(6),
    }
    fn = lambda p, x: jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    x = normal(64, 12, seed=4)
    student, tx = fn, optax.adam(3e-3)
    if how == "compact":
        graph = jp.trace(fn, dense, x)
        masks = jp.structure.unit_masks(graph, jp.scores.magnitude(dense), sparsity=0.5)
        student, params = jp.compact(fn, dense, masks, x)
    elif how == "masks":
        params, masks = jp.prune_tree(dense, 0.7)
        tx = jp.masked_update(tx, masks)
    else:
        student = jp.compressed(fn)
        params = {
            "quantize": lambda: jp.quantize_tree(dense, bits=2),
            "qat": lambda: jp.qat.prepare(dense, bits=2),
            "clusters": lambda: jp.cluster_tree(dense, bits=1),
            "factors": lambda: jp.factorize_tree(dense, rank=2),
        }[how]()
    error = lambda p: float(jnp.mean((student(p, x) - fn(dense, x)) ** 2))
    seen = []
    tuned = jp.distill.recover(
        student, params, fn, dense, [x] * 60, tx, on_step=lambda step, aux: seen.append(step)
    )
    assert error(tuned) < 0.85 * error(params)
    assert seen == list(range(60))
    if how == "masks":
        kept = jax.tree.map(lambda p, m: bool(jnp.all(jnp.where(m, True, p == 0))), tuned, masks)
        assert all(jax.tree.leaves(kept))


def test_layers_drop_one_by_one():
    def fn(p, x):
        for i in range(4):
            x = x + jax.nn.relu(x @ p[f"up{i}"] + p[f"b{i}"]) @ p[f"down{i}"]
        return x @ p["out"]

    params = {"out": normal(6, 3, seed=9)}
    for i in range(4):
        params |= {f"up{i}": normal(6, 12, seed=i) / 3, f"b{i}": jnp.zeros(12)}
        params |= {f"down{i}": normal(12, 6, seed=10 + i) / 6}
    x = normal(64, 6, seed=4)
    rounds = []

    def data():
        rounds.append(1)
        return [x] * 40

    small, left = jp.distill.drop_layers(
        fn, params, data, optax.adam(3e-3), count=2, match={f"l{i}": f"down{i}" for i in range(4)}
    )
    assert len(rounds) == 4  # a first batch and an epoch in each of two stages
    assert sum(leaf.size > 0 for leaf in jax.tree.leaves(left)) == 7
    error = lambda y: float(jnp.mean((y - fn(params, x)) ** 2))
    graph = jp.trace(fn, params, x)
    scores = jp.structure.layer_scores(graph, params, x)
    masks = jp.structure.layer_masks(graph, layer_scores=scores, count=2)
    assert error(small(left, x)) < 0.5 * error(fn(jp.apply_masks(params, masks), x))
    with pytest.raises(ValueError, match="at most one for each"):
        jp.distill.drop_layers(fn, params, data, optax.sgd(0.1), count=1, stages=2)
    with pytest.raises(ValueError, match="down0"):
        jp.distill.drop_layers(
            fn, params, data, optax.sgd(0.1), count=1, stages=1, match={"a": "down"}
        )
    with pytest.raises(ValueError, match="in each stage"):
        jp.distill.drop_layers(fn, params, list, optax.sgd(0.1), count=1, stages=1)


def test_precompute_keeps_outputs(tmp_path):
    fn = lambda p, x: x @ p
    data = [normal(4, 3, seed=i) for i in range(3)]
    p = normal(3, 2)
    outputs = jp.distill.precompute(tmp_path / "t", fn, p, data, dtype=np.float32)
    np.testing.assert_allclose(outputs, np.concatenate([x @ p for x in data]), rtol=1e-5, atol=1e-6)
    assert jp.distill.load_outputs(tmp_path / "t")[[5, 1]].shape == (2, 2)
    with pytest.raises(FileExistsError):
        jp.distill.precompute(tmp_path / "t", fn, p, data)
    with pytest.raises(ValueError, match="at least one"):
        jp.distill.precompute(tmp_path / "u", fn, p, [])
    with pytest.raises(ValueError, match="after some"):
        jp.distill.precompute(tmp_path / "u", lambda p, x: x, p, [normal(2, 3), normal(2, 4)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["t"]
    (tmp_path / "t" / "about.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        jp.distill.load_outputs(tmp_path / "t")


def test_mutual_and_ema():
    outs = [normal(4, 5, seed=i) for i in range(3)]
    losses = jp.distill.mutual(outs, temperature=2.0)
    wanted = (
        jp.distill.kd(outs[0], outs[1], temperature=2.0)
        + jp.distill.kd(outs[0], outs[2], temperature=2.0)
    ) / 2
    np.testing.assert_allclose(losses[0], wanted, rtol=1e-6)
    tree = {"w": jnp.ones(2), "n": jnp.array(3)}
    moved = jp.distill.ema(tree, {"w": jnp.zeros(2), "n": jnp.array(4)}, 0.9)
    np.testing.assert_allclose(moved["w"], 0.9, rtol=1e-6)
    assert moved["n"] == 4
    with pytest.raises(ValueError, match="at least two"):
        jp.distill.mutual(outs[:1])
