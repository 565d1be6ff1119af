"""State that is no parameter: caches and recurrent states shrink with the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

RNG = np.random.default_rng(0)
WIDTH, HEADS, KV_HEADS, DIMS, NEURONS, TOKENS, LAYERS, PLACES = 16, 4, 2, 8, 24, 30, 2, 6


def normal(*shape):
    return jnp.asarray(0.4 * RNG.standard_normal(shape), jnp.float32)


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def layer():
    kernels = {"q": (WIDTH, HEADS, DIMS), "o": (HEADS, DIMS, WIDTH)}
    kernels |= dict.fromkeys("kv", (WIDTH, KV_HEADS, DIMS))
    kernels |= dict.fromkeys(("gate", "up"), (WIDTH, NEURONS)) | {"down": (NEURONS, WIDTH)}
    scales = {"norm": normal(WIDTH) + 1, "norm2": normal(WIDTH) + 1}
    return {name: normal(*shape) for name, shape in kernels.items()} | scales


PARAMS = {
    "embed": normal(TOKENS, WIDTH),
    "norm": normal(WIDTH) + 1,
    "layers": [layer() for _ in range(LAYERS)],
}


def block(p, x, mask, cached):
    h = rms(x, p["norm"])
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
    k, v = cached(k, v)
    q = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, DIMS)
    scores = jnp.where(mask, jnp.einsum("btkgd,bskd->bkgts", q, k) / DIMS**0.5, -1e9)
    y = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bthk,hkd->btd", y.reshape(*y.shape[:2], HEADS, DIMS), p["o"])
    h = rms(x, p["norm2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def forward(p, tokens):
    x, t = p["embed"][tokens], tokens.shape[1]
    for own in p["layers"]:
        x = block(own, x, jnp.tril(jnp.ones((t, t), bool)), lambda k, v: (k, v))
    return rms(x, p["norm"]) @ p["embed"].T


def decode(p, token, cache, place):
    """A step of a decoder with grouped queries and a cache of keys and values."""
    x, after = p["embed"][token][:, None], []
    mask = (jnp.arange(cache[0]["k"].shape[1]) <= place)[None]
    for own, before in zip(p["layers"], cache, strict=True):

        def cached(k, v, before=before):
            put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, place, 0, 0))
            after.append({"k": put(before["k"], k), "v": put(before["v"], v)})
            return after[-1]["k"], after[-1]["v"]

        x = block(own, x, mask, cached)
    return (rms(x, p["norm"]) @ p["embed"].T)[:, 0], after


def empty_cache(batch):
    zeros = jnp.zeros((batch, PLACES, KV_HEADS, DIMS))
    return [{"k": zeros, "v": zeros} for _ in range(LAYERS)]


STATES = {"cache": lambda out: out[1]}
TOKEN, PLACE = jnp.array([1, 2]), jnp.array(0)
DECODE = (TOKEN, empty_cache(2), PLACE)


def test_a_cached_step_has_the_groups_of_a_forward_pass():
    whole = jp.trace(forward, PARAMS, jnp.ones((2, PLACES), int))
    step = jp.trace(decode, PARAMS, *DECODE, states=STATES)
    assert {(g.size, g.members) for g in step.groups} == {(g.size, g.members) for g in whole.groups}
    frozen = jp.trace(decode, PARAMS, *DECODE)  # without a word about the cache
    assert len(frozen.groups) < len(step.groups)


def test_generation_with_a_small_cache():
    graph = jp.trace(decode, PARAMS, *DECODE, states=STATES)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(PARAMS), sparsity=0.5, scope="leaf")
    masked = jp.apply_masks(PARAMS, masks)
    small_fn, small = jp.compact(decode, PARAMS, masks, *DECODE, states=STATES, verify=True)
    assert len(small_fn.differences) == 5
    tokens = jnp.asarray(RNG.integers(0, TOKENS, (3, PLACES)))  # another batch than traced
    cache, full = small_fn.small_state("cache", empty_cache(3)), empty_cache(3)
    assert cache[0]["k"].shape == (3, PLACES, KV_HEADS // 2, DIMS // 2)
    step = jax.jit(small_fn)
    for place in range(PLACES):
        found, cache = step(small, tokens[:, place], cache, jnp.array(place))
        expected, full = decode(masked, tokens[:, place], full, jnp.array(place))
        np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found, forward(masked, tokens)[:, -1], atol=1e-4)
    prefill = small_fn.of(forward)
    np.testing.assert_allclose(prefill(small, tokens), forward(masked, tokens), atol=1e-4)


def test_states_go_to_files_with_the_function(tmp_path):
    masks = jp.structure.unit_masks(
        jp.trace(decode, PARAMS, *DECODE, states=STATES), jp.scores.magnitude(PARAMS), sparsity=0.3
    )
    small_fn, small = jp.compact(decode, PARAMS, masks, *DECODE, states=STATES)
    jp.export.save(tmp_path / "model", (small_fn, small))
    again, params = jp.export.load(tmp_path / "model")
    again = again.of(decode, states=STATES)
    cache = again.small_state("cache", empty_cache(2))
    for a, b in zip(
        jax.tree.leaves(again(params, TOKEN, cache, PLACE)),
        jax.tree.leaves(small_fn(small, TOKEN, cache, PLACE)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


RECURRENT = {"in": normal(5, 12), "rec": normal(12, 12), "bias": normal(12), "out": normal(12, 3)}


def recurrent(p, x, h):
    h = jnp.tanh(x @ p["in"] + h @ p["rec"] + p["bias"])
    return h @ p["out"], h


def gated(p, x, h):
    """What leaves is one half where a unit is masked: a sum would see it."""
    h = jax.nn.sigmoid(x @ p["in"] + h @ p["rec"] + p["bias"])
    return h @ p["out"], h


def summed(p, x, h):
    y, h = gated(p, x, h)
    return y + (h**3).sum(-1, keepdims=True), h


@pytest.mark.parametrize("fn", [recurrent, gated, summed])
def test_recurrent_states_by_position(fn):
    x, h = normal(2, 5), jnp.zeros((2, 12))
    states = {1: lambda out: out[1]}
    graph = jp.trace(fn, RECURRENT, x, h, states=states)
    keep = jnp.arange(12) % 3 > 0
    masks = {"in": keep[None], "rec": keep[:, None] & keep, "bias": keep, "out": keep[:, None]}
    if not graph.groups:
        assert fn is summed
        return
    small_fn, small = jp.compact(fn, RECURRENT, masks, x, h, states=states, verify=True)
    masked, state = jp.apply_masks(RECURRENT, masks), small_fn.small_state(1, h)
    assert state.shape == (2, 8)
    for _ in range(3):
        (y, state), (expected, h) = small_fn(small, x, state), fn(masked, x, h)
        np.testing.assert_allclose(y, expected, atol=1e-4)
        np.testing.assert_allclose(state, h[:, np.asarray(keep)], atol=1e-4)


def test_a_state_that_is_only_read_and_one_that_grows():
    fn = lambda p, x, shift: (x @ p["a"] + shift) @ p["b"]
    params, x, shift = {"a": normal(4, 8), "b": normal(8, 2)}, normal(2, 4), jnp.zeros(8)
    assert not jp.trace(fn, params, x, shift).groups
    assert [g.size for g in jp.trace(fn, params, x, shift, states={"shift": None}).groups] == [8]

    def growing(p, x, seen):
        seen = jnp.concatenate([seen, (x @ p["a"])[:, None]], 1)
        return seen.sum(1) @ p["b"], seen

    states, seen = {"seen": lambda out: out[1]}, jnp.zeros((2, 3, 8))
    keep = jnp.arange(8) < 5
    masks = {"a": keep[None], "b": keep[:, None]}
    small_fn, small = jp.compact(growing, params, masks, x, seen, states=states, verify=True)
    _, after = small_fn(small, x, small_fn.small_state("seen", seen))
    assert after.shape == (2, 4, 5)
    assert small_fn(small, x, after)[1].shape == (2, 5, 5)


def test_bad_states():
    small_fn, small = jp.compact(
        recurrent,
        RECURRENT,
        jax.tree.map(lambda _: True, RECURRENT) | {"bias": jnp.arange(12) > 0},
        normal(2, 5),
        jnp.zeros((2, 12)),
        states={"h": lambda out: out[1]},
    )
    with pytest.raises(ValueError, match="'other' names no argument"):
        jp.trace(decode, PARAMS, *DECODE, states={"other": None})
    with pytest.raises(ValueError, match="'cache': its leaf '0/k' has no update of 4 axes"):
        jp.trace(decode, PARAMS, *DECODE, states={"cache": lambda out: out[0]})
    with pytest.raises(ValueError, match="'g' is no state of this function; it has .'h'."):
        small_fn.small_state("g", jnp.zeros((2, 12)))
    masks = {"in": (keep := jnp.arange(12) > 4)[None], "bias": keep, "out": keep[:, None]}
    masks["rec"] = keep[:, None] & keep
    how = {"states": {"h": lambda out: out[1]}}
    small_fn, small = jp.compact(
        recurrent, RECURRENT, masks, normal(2, 5), jnp.ones((2, 12)), **how
    )
    with pytest.raises(ValueError, match=r"7 of 12 entries of axis 1 are left: cut it with"):
        small_fn(small, normal(2, 5), jnp.zeros((2, 12)))
    with pytest.raises(ValueError, match=r"'h' has shape \(2, 11\), expected \(2, 12\)"):
        small_fn.small_state("h", jnp.zeros((2, 11)))


def test_a_state_that_does_not_start_at_zero_is_told():
    def averaged(p, x, seen):
        y = x @ p["a"]
        seen = 0.9 * seen + 0.1 * y * y
        return (y / jnp.sqrt(1 + seen.mean(-1, keepdims=True))) @ p["b"], seen

    params, x, ones = {"a": normal(4, 8), "b": normal(8, 2)}, normal(2, 4), jnp.ones((2, 8))
    keep = jnp.arange(8) < 5
    masks, how = {"a": keep[None], "b": keep[:, None]}, {"states": {"seen": lambda out: out[1]}}
    with pytest.warns(UserWarning, match="state 'seen': what is cut of it is not zero"):
        small_fn, _ = jp.compact(averaged, params, masks, x, ones, **how)
    with pytest.warns(UserWarning, match="state 'seen': what is cut of it is not zero"):
        small_fn.small_state("seen", ones)
    assert small_fn.small_state("seen", 0 * ones).shape == (2, 5)


def test_counts_in_narrow_integers_wrap_as_the_masked_function_does():
    def fn(p, x):
        h = x @ p["a"]
        n = jnp.sum((jnp.cos(h) > 0).astype(jnp.int8), -1, keepdims=True, dtype=jnp.int8)
        return (h * n) @ p["b"]

    params, x = {"a": normal(4, 600), "b": normal(600, 3)}, normal(2, 4)
    keep = jnp.arange(600) % 5 > 1
    masks = {"a": keep[None], "b": keep[:, None]}
    small_fn, small = jp.compact(fn, params, masks, x)
    np.testing.assert_allclose(
        small_fn(small, x), fn(jp.apply_masks(params, masks), x), rtol=1e-4, atol=1e-3
    )
