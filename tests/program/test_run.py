"""One executor: programs within programs run as they were traced, and what is noted in them comes out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.program import Executor, Flow, HookResult, Tracked, inputs_of, trace_program

W = {"w": jax.random.normal(jax.random.key(0), (4, 4)), "s": 0.5 * jnp.ones((3, 4, 4))}
X = jax.random.normal(jax.random.key(1), (2, 4))


def scan(p, x):
    return jax.lax.scan(lambda h, s: (jnp.tanh(h @ s @ p["w"]), h.sum()), x, p["s"])


def while_loop(p, x):
    body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]))
    return jax.lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1] + p["s"].sum()


def cond(p, x):
    return jax.lax.cond(x.sum() > 1e9, lambda h: h @ p["w"], lambda h: h @ p["s"][0], x)


def custom(p, x):
    @jax.custom_vjp
    def rounded(h, w):
        return jnp.round(h @ w)

    rounded.defvjp(lambda h, w: (rounded(h, w), w), lambda w, g: (g, 0 * w))
    return rounded(x, p["w"]) + p["s"].sum()


def nested(p, x):
    def step(h, s):
        return jax.lax.cond(s.sum() > 0, lambda h: custom(p, h), lambda h: h, h), None

    return jax.lax.scan(step, x, p["s"], reverse=True)[0]


def sharded(p, x):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    run = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec("d"), spec()), out_specs=spec("d")
    )
    return run(x, p["w"]) + p["s"].sum()


NESTED = (scan, while_loop, cond, custom, nested, sharded)


def run(fn, executor, track=False):
    program = trace_program(fn, W, X)
    inputs = [W["s"], W["w"]]
    if track:
        inputs = [Tracked.of(W["s"], "s"), Tracked.of(W["w"], "w")]
    outs, record = executor.run(program, [*inputs, X])
    return program.out_tree.unflatten(outs), record


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("fn", NESTED)
def test_entered_programs_compute_the_same(fn, track):
    expected = fn(W, X)
    found, _ = run(fn, Executor(enters=lambda operation: True), track)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def products(step):
    """Counts the products of tracked parameters."""
    hits = [x.path for x in step.operands if isinstance(x, Tracked)]
    is_product = step.operation.name == "dot_general"
    return HookResult(record={hits[0]: jnp.ones(())} if hits and is_product else None)


def total(name, records, stacked):
    return records[0].sum(0) if stacked else sum(records)


zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))


@pytest.mark.parametrize(
    ("fn", "counts"),
    [
        (scan, {"w": 3.0, "s": [1.0, 1, 1]}),
        (while_loop, {"w": 3.0}),
        (cond, {"w": 0.0, "s": 1.0}),
        (custom, {"w": 1.0}),
        (nested, {"w": 3.0}),
    ],
)
def test_what_is_noted_comes_out(fn, counts):
    executor = Executor(products, enters=lambda op: True, merge=total, neutral=zeros)
    _, record = run(fn, executor, track=True)
    assert {k: v.tolist() for k, v in record.items()} == counts


@pytest.mark.parametrize("fn", [while_loop, cond])
def test_what_is_lost_is_told(fn):
    with pytest.warns(UserWarning, match="'w': what happens to it inside of"):
        run(fn, Executor(products, enters=lambda operation: True), track=True)


def test_functions_with_gradients_of_their_own_keep_them_unless_entered():
    gradient = lambda **how: jax.grad(
        lambda x: Executor(**how).run(trace_program(custom, W, x), [W["s"], W["w"], x])[0][0].sum()
    )(X)
    assert np.all(gradient() == 1)
    assert np.all(gradient(enters=lambda operation: True) == 0)


@pytest.mark.parametrize("fn", NESTED[:-1])
def test_flow_finds_readers_in_inner_programs(fn):
    program = trace_program(fn, W, X)
    flow = Flow(program, 2)
    sides = [flow.leaf(i) for op in flow.operations if op.name == "dot_general" for i in op.ins]
    assert 1 in sides
    numbers = [i for op in flow.operations for i in op.outs]
    assert len(numbers) == len(set(numbers)), "numbers of values are unique, inner ones included"


def test_calibration_counts_what_loops_and_branches_do():
    stats = jp.calibrate(while_loop, W, [X])
    assert (stats["w"].count, stats["w"].absmax.shape) == (6, (4,))
    stats = jp.calibrate(cond, W, [X, X])
    assert (stats["w"].count, stats["w"].low, stats["w"].absmax.max()) == (0, 0, 0)
    with pytest.warns(UserWarning, match="'w' inside of shard_map"):
        assert jp.calibrate(sharded, W, [X])["w"].count == 0


def test_inputs_tell_types_and_values_apart():
    key = lambda *args, **kwargs: inputs_of(args, kwargs).key
    x = jnp.ones(2)
    different = [
        key(x, 1),
        key(x, True),
        key(x, 1.0),
        key(x, "1"),
        key(x, n=1),
        key(jnp.ones(3), 1),
    ]
    different += [key(x.astype(jnp.bfloat16), 1), key(x, (1,)), key(x, None)]
    assert len(set(different)) == len(different)
    assert key(x, 1) == key(2 * x, 1)


def test_unhashable_arguments_are_named():
    from dataclasses import dataclass

    @dataclass
    class Config:
        n: int = 1

    fn = lambda p, x, config=None, how=None: x @ p["w"]
    keep = jax.tree.map(lambda _: True, W)
    for name, args, kwargs in (
        (r"args\[1\]", (X, Config()), {}),
        (r"how\['deep'\]", (X,), {"how": {"deep": Config()}}),
    ):
        match = f"{name}: static arguments must be hashable.*frozen"
        with pytest.raises(TypeError, match=match):
            jp.compressed(fn)(W, *args, **kwargs)
        with pytest.raises(TypeError, match=match):
            jp.compact(fn, W, keep, *args, **kwargs)
    with pytest.raises(TypeError, match="args.1.: static"):
        jp.calibrate(lambda p, x, c: x @ p["w"], W, [(X, Config())])


def test_caches_are_bounded_and_forget_what_ends():
    from jaxprune.program import TraceCache

    cache = TraceCache(2)
    made = []
    for key in (1, 2, 1, 3, 1, 2):
        cache.get(key, lambda key=key: made.append(key))
    assert (len(cache), made) == (2, [1, 2, 3, 2]), "the least recently used goes"

    outer = []

    @jax.jit
    def with_closure(y):
        fn = jp.compressed(lambda p, x: x @ p["w"] + y)
        outer.append(fn)
        return fn(W, X)

    with_closure(jnp.ones(4))
    assert len(outer[0]._programs) == 0, "a value of a trace that has ended is not kept"


def test_settings_are_part_of_keys():
    run = jp.compressed(lambda p, x: x @ p["w"])
    run(W, X)
    with jax.default_matmul_precision("highest"):
        run(W, X)
    assert len(run._programs) == 2
