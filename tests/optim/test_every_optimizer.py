"""One contract for our transforms around every optimizer of optax, and around and inside every wrapper.

The tables of docs/optimizers.md are what these tests find: `JAXPRUNE_WRITE_DOCS=1 pytest tests/optim`
writes them anew.
"""

import inspect
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.optim._optimizers import NO_FLOAT16, NOT_RUN, OPTIMIZERS, RATE, WRAPPERS

DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"
F32, F16, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)
PARAMS = {"w": jax.random.normal(jax.random.key(0), (4, 6)), "b": jnp.ones(6)}
MASKS = {"w": jax.random.bernoulli(jax.random.key(1), 0.5, (4, 6)), "b": jnp.array(True)}
TRANSFORMS = {
    "masked_update": lambda inner: jp.masked_update(inner, MASKS),
    "packed": lambda inner: jp.masked_update(inner, MASKS, packed=True),
    "gradual": lambda inner: jp.optim.gradual(inner, jp.schedules.linear(0.5, end=2)),
}
COLUMNS = [
    *(("masked_update", *dtypes) for dtypes in ((F32, F32), (F32, F16), (BF16, BF16))),
    ("packed", F32, F32),
    *(("gradual", F32, grads) for grads in (F32, F16)),
]


def loss(params):
    return sum(jnp.sum(jnp.sin(x + 1)) for x in jax.tree.leaves(params))


def extras(name, params):
    """The further arguments of `update` that optimizers ask for."""
    if name in ("contrib.sam", "lookahead"):
        return {}
    if name == "contrib.sophia":
        return {"obj_fn": lambda params: loss(jp.apply_masks(params, MASKS))}
    value, grad = jax.value_and_grad(loss)(params)
    return {"value": value, "grad": grad, "value_fn": loss}


def fast(params):
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def train(tx, params, name, *, grads=F32, steps=4):
    """Parameters, state and, per step, how many pruned weights are not zero."""

    def step(carry, _):
        params, state = carry
        seen = jp.apply_masks(fast(params), MASKS)  # what is pruned tells nothing
        given = extras(name, seen)
        g = jax.tree.map(lambda x: x.astype(grads), jax.grad(loss)(fast(params)))
        updates, state = tx.update(g, state, params, **given)
        params = optax.apply_updates(params, updates)
        revived = sum(jax.tree.leaves(jp.optim.check(state, params)))
        return (params, state), revived

    carry = params, tx.init(params)
    (params, state), revived = jax.lax.scan(step, carry, None, length=steps)
    return params, state, revived


def cast(params, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), params)


def comparable(tree):
    return [
        np.asarray(x, np.float32)
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]


def holds(name, transform, weights, grads):
    """Whether pruned weights are exactly zero after every step, kept ones finite, and neither they nor
    the optimizer's state know anything of what the pruned ones were."""
    tx = TRANSFORMS[transform](OPTIMIZERS[name]())
    run = jax.jit(lambda params: train(tx, params, name, grads=grads))
    params = cast(PARAMS, weights)
    trained, state, revived = run(params)
    assert not np.any(revived), f"{name}: pruned weights come back, {revived} a step"
    assert {x.dtype for x in jax.tree.leaves(trained)} == {weights}
    assert all(np.isfinite(x).all() for x in comparable(trained)), f"{name}: not finite"
    assert jp.sparsity(trained) >= 0.45
    if transform == "gradual":
        return True
    other = jax.tree.map(lambda p, m: jnp.where(m, p, p + 1), params, MASKS)
    for a, b in zip(comparable((trained, state)), comparable(run(other)[:2]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{name}: pruned weights leave traces")
    return True


def narrow(name):
    return F32 if name in NO_FLOAT16 else F16


def test_every_optimizer_is_here():
    known = {name.removeprefix("contrib.") for name in (*OPTIMIZERS, *NOT_RUN)}
    modules = {"optax._src.alias", *(f"optax.contrib._{n}" for n in known)}
    found = {
        name
        for home in (optax, optax.contrib)
        for name, f in vars(home).items()
        if inspect.isfunction(f)
        and f.__module__ in modules
        and not name.startswith("scale_by")
        and next(iter(inspect.signature(f).parameters), "") == "learning_rate"
    }
    assert found <= known


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_and_leave_no_traces(name):
    assert holds(name, "masked_update", F32, narrow(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_transform_and_dtype(name):
    cells = []
    for transform, weights, grads in COLUMNS:
        if grads == F16 and name in NO_FLOAT16:
            cells.append(f"optax: {NO_FLOAT16[name]}")
        else:
            cells.append("zero" if holds(name, transform, weights, grads) else "not zero")
    row(name, cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_FLOAT16)
def test_optax_alone_fails_there_too(name):
    def bare(params):
        tx = OPTIMIZERS[name]()

        def step(carry, _):
            params, state = carry
            g = cast(jp.apply_masks(jax.grad(loss)(params), MASKS), F16)  # with zeros
            updates, state = tx.update(g, state, params, **extras(name, params))
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=4)[0][0]

    try:
        finite = all(np.isfinite(x).all() for x in comparable(jax.jit(bare)(PARAMS)))
    except TypeError:
        finite = False
    assert not finite


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow
def test_state_of_pruned_weights_is_fresh_after_a_change(name):
    """Histories that differ only in weights pruned since leave the same state behind."""
    tx = jp.masked_update(OPTIMIZERS[name](), jax.tree.map(jnp.ones_like, MASKS))

    @jax.jit
    def run(params):
        trained, state, _ = train(tx, params, name, steps=2)
        state = jp.optim.replace_masks(state, MASKS)
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, after = tx.update(grads, state, trained, **extras(name, trained))
        fresh = tx.init(optax.apply_updates(trained, updates))
        _, fresh = tx.update(
            grads, jp.optim.replace_masks(fresh, MASKS), trained, **extras(name, trained)
        )
        return after, fresh

    after, fresh = run(PARAMS)
    of_w = lambda state: [
        np.asarray(x)[..., ~np.asarray(MASKS["w"])]
        for path, x in jax.tree_util.tree_leaves_with_path(state.inner_state)
        if jnp.shape(x)[-2:] == (4, 6) and "'w'" in jax.tree_util.keystr(path)
    ]
    for a, b in zip(of_w(after), of_w(fresh), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def wrapped(name, inside, transform):
    """What becomes of pruned weights with a wrapper inside or around a transform."""
    wrap = WRAPPERS[name]
    ours = TRANSFORMS[transform]
    tx = ours(wrap(optax.adam(RATE))) if inside else wrap(ours(optax.adam(RATE)))
    params = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    run = jax.jit(lambda params: train(tx, params, name, steps=6))
    try:
        trained, _, revived = run(params)
    except ValueError as error:
        return f"refused: {str(error).split(':')[0]}"
    assert all(np.isfinite(x).all() for x in comparable(trained))
    return "revived" if np.any(revived[2:]) else "zero"


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name):
    """Inside, whatever optax has to offer; around, what leaves updates as they are."""
    inside = wrapped(name, True, "packed")
    around, gradual = (
        wrapped(name, False, transform) for transform in ("masked_update", "gradual")
    )
    follows = name.startswith("chain, followed") or name == "lookahead"
    assert inside == "zero"
    assert around == ("revived" if follows else "zero")
    assert gradual == ("refused: where" if name == "flatten" else around)  # a vector has no weights
    row(f"`{name}`", [inside, around, gradual])


def row(name, cells):
    """Finds the row in the table, or writes it."""
    line = f"| {name} | {' | '.join(cells)} |"
    lines = DOCS.read_text().splitlines()
    if os.environ.get("JAXPRUNE_WRITE_DOCS"):
        at = [i for i, old in enumerate(lines) if old.startswith(f"| {name} |")]
        assert at, f"{DOCS.name} needs a row that begins with '| {name} |'"
        lines[at[0]] = line
        DOCS.write_text("\n".join(lines) + "\n")
    assert line in lines, f"{DOCS.name} says otherwise: {line}"
