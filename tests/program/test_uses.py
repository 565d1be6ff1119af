"""What leaves are for, read off programs; and everything that chooses leaves or axes by it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxprune as jp


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def roles(use):
    return use.kind, use.stacked, use.contracted, use.free, use.spatial


def found(fn, params, *args):
    uses = jp.uses(fn, params, *args)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(uses)]
    return dict(zip(paths, jax.tree.leaves(uses), strict=True))


X = normal(2, 8)
W, STACK = normal(8, 8), normal(3, 8, 8)
LAYERS = lambda body: lambda p, x: jax.lax.scan(lambda h, w: (body(h, w), None), x, p["w"])[0]
CUSTOM = jax.custom_vjp(lambda w, x: x @ w)
CUSTOM.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
PRODUCT = ("product", (), (-2,), (-1,), ())
TRANSPOSED = ("product", (), (-1,), (-2,), ())
STACKED = ("product", (-3,), (-2,), (-1,), ())
CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
PROGRAMS = {
    "matrix": (lambda p, x: x @ p["w"], W, PRODUCT),
    "out, in": (lambda p, x: x @ p["w"].T, W, TRANSPOSED),
    "scaled and cast": (lambda p, x: x @ (p["w"] * 2.0).astype(jnp.bfloat16), W, PRODUCT),
    "standardised": (lambda p, x: x @ ((p["w"] - p["w"].mean(0)) / p["w"].std(0)), W, PRODUCT),
    "remat": (lambda p, x: jax.checkpoint(lambda w, x: x @ w)(p["w"], x), W, PRODUCT),
    "custom_vjp": (lambda p, x: CUSTOM(p["w"], x), W, PRODUCT),
    "cond": (
        lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x, x),
        W,
        PRODUCT,
    ),
    "recurrence": (
        lambda p, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=3)[0],
        W,
        PRODUCT,
    ),
    "scan": (LAYERS(lambda h, w: h @ w), STACK, STACKED),
    "scan, out in": (LAYERS(lambda h, w: h @ w.T), STACK, ("product", (-3,), (-1,), (-2,), ())),
    "unrolled stack": (lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2], STACK, STACKED),
    "fori_loop": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: h @ p["w"][i], x),
        STACK,
        STACKED,
    ),
    "vmap": (lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], normal(3, 2, 8)), STACK, STACKED),
    "expert by index": (
        lambda p, x: jnp.einsum("bd,bdf->bf", x, p["w"][(x[:, 0] > 0).astype(int)]),
        STACK,
        STACKED,
    ),
    "ragged experts": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([1, 1, 0])),
        STACK,
        STACKED,
    ),
    "heads out": (
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]),
        normal(8, 2, 4),
        ("product", (), (-3,), (-2, -1), ()),
    ),
    "heads in": (
        lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(2, 2, 4), p["w"]),
        normal(2, 4, 8),
        ("product", (), (-3, -2), (-1,), ()),
    ),
    "heads merged": (
        lambda p, x: x @ p["w"].reshape(8, 8),
        normal(8, 2, 4),
        ("product", (), (-3,), (-2, -1), ()),
    ),
    "in blocks": (
        lambda p, x: x[:, :4] @ p["w"][:4] + x[:, 4:] @ p["w"][4:],
        W,
        PRODUCT,
    ),
    "low rank": (lambda p, x: x @ (p["w"] @ normal(8, 8)), W, PRODUCT),
    "convolution": (
        lambda p, x: jax.lax.conv_general_dilated(normal(1, 6, 6, 4), p["w"], **CONV),
        normal(3, 3, 4, 8),
        ("convolution", (), (-2,), (-1,), (-4, -3)),
    ),
    "depthwise": (
        lambda p, x: jax.lax.conv_general_dilated(
            normal(1, 6, 6, 8), p["w"], feature_group_count=8, **CONV
        ),
        normal(3, 3, 1, 8),
        ("convolution", (), (), (-1,), (-4, -3)),
    ),
    "convolutions under vmap": (
        lambda p, x: jax.vmap(lambda w, x: jax.lax.conv_general_dilated(x, w, **CONV))(
            p["w"], normal(5, 1, 6, 6, 2)
        ),
        normal(5, 3, 3, 2, 4),
        ("convolution", (-5,), (-2,), (-1,), (-4, -3)),
    ),
    "embedding": (
        lambda p, x: p["w"][(x > 0).astype(int)],
        normal(20, 8),
        ("look-up", (), (), (-2,), ()),
    ),
    "tied embedding": (
        lambda p, x: p["w"][(x[:, 0] > 0).astype(int)] @ p["w"].T,
        normal(20, 8),
        TRANSPOSED,
    ),
    "bias of heads": (
        lambda p, x: x.reshape(2, 2, 4) + p["w"],
        normal(2, 4),
        ("elementwise", (), (), (-2, -1), ()),
    ),
    "stacked scale": (
        LAYERS(lambda h, w: h * w),
        normal(3, 8),
        ("elementwise", (-2,), (), (-1,), ()),
    ),
    "unread": (lambda p, x: x, W, ("unused", (), (), (), ())),
    "penalty": (lambda p, x: x.sum() + jnp.linalg.qr(p["w"])[0].sum(), W, ("other",) + ((),) * 4),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_roles(name):
    fn, w, wanted = PROGRAMS[name]
    use = jp.uses(fn, {"w": w}, X)["w"]
    assert roles(use) == wanted
    assert not use.contradiction


def test_contradictions_are_named_and_the_first_use_decides():
    use = jp.uses(lambda p, x: x @ p["w"] @ p["w"].T, {"w": W}, X)["w"]
    assert roles(use) == PRODUCT
    assert "axis -2 is contracted at" in use.contradiction
    assert "test_uses.py" in use.contradiction
    # whoever stacks layers has the say in any order: layers never share a scale
    fn = lambda p, x: (p["w"].reshape(3, 64) @ normal(64)).sum() + LAYERS(lambda h, w: h @ w)(p, x)
    assert jp.uses(fn, {"w": STACK}, X)["w"].stacked == (-3,)
    with pytest.warns(UserWarning, match="'w'.*axis -2 is contracted"):
        jp.quantize_tree({"w": W}, uses=jp.uses(lambda p, x: x @ p["w"] @ p["w"].T, {"w": W}, X))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(32)(x))), None


def network(layers):
    scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers)
    net, x = scan(), normal(2, 4, 8)
    params = net.init(jax.random.key(0), x, None)
    return (lambda p, x: net.apply(p, x, None)[0]), params, x


def test_flax_modules():
    fn, params, x = network(3)
    uses = jp.uses(fn, params, x)["params"]
    attention = uses["MultiHeadDotProductAttention_0"]
    assert roles(attention["query"]["kernel"]) == ("product", (-4,), (-3,), (-2, -1), ())
    assert roles(attention["out"]["kernel"]) == ("product", (-4,), (-3, -2), (-1,), ())
    assert roles(attention["key"]["bias"]) == ("elementwise", (-3,), (), (-2, -1), ())
    assert roles(uses["LayerNorm_0"]["scale"]) == ("elementwise", (-2,), (), (-1,), ())
    model = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)
    graphdef, state = nnx.split(model)
    same = jp.uses(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
    assert roles(same["query"]["kernel"].value) == ("product", (), (-3,), (-2, -1), ())


def test_shapes_suffice_and_compressed_leaves_count_as_what_they_stand_for():
    fn, params, x = network(2)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    uses = jp.uses(fn, params, x)
    assert jp.uses(fn, shapes, jax.ShapeDtypeStruct(x.shape, x.dtype)) == uses
    assert jp.uses(fn, jp.quantize_tree(params, uses=uses), x) == uses
    assert jp.trace(fn, params, x).uses == uses


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize("settings", [{}, {"bits": 4, "group_size": 4}, {"granularity": "tensor"}])
def test_stacked_layers_never_share_a_scale(settings):
    fn, params, x = network(3)
    sizes = jnp.array([1.0, 0.05, 0.002])
    params = jax.tree.map(lambda w: w * sizes.reshape(3, *[1] * (w.ndim - 1)), params)
    for uses in (jp.uses(fn, params, x), None):
        if uses is None and "group_size" in settings:
            continue  # heads are not where groups lie by convention
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dense = jp.dequantize_tree(jp.quantize_tree(params, uses=uses, **settings))
        for path, w in jax.tree.leaves_with_path(params):
            got = dense
            for key in path:
                got = got[key.key]
            worst = max(relative(got[i], w[i]) for i in range(3) if w[i].any()) if w.any() else 0.0
            assert worst < (0.1 if "bits" in settings else 0.01), path


def test_scanned_and_unrolled_layers_quantize_alike():
    uses = jp.uses(LAYERS(lambda h, w: h @ w.T), {"w": STACK}, X)
    alone = jp.uses(lambda p, x: x @ p["w"].T, {"w": W}, X)
    for settings in (
        {"bits": 4},
        {"bits": 8, "group_size": 4},
        {"bits": 4, "granularity": "tensor"},
    ):
        whole = jp.quantize_tree({"w": STACK}, uses=uses, **settings)["w"].materialize()
        for i in range(3):
            one = jp.quantize_tree({"w": STACK[i]}, uses=alone, **settings)["w"].materialize()
            np.testing.assert_array_equal(whole[i], one)


@pytest.mark.parametrize("name", [n for n, (_, _, r) in PROGRAMS.items() if r[0] != "unused"])
def test_quantized_by_uses_runs_in_every_program(name):
    fn, w, wanted = PROGRAMS[name]
    params = {"w": w}
    uses = jp.uses(fn, params, X)
    tree = jp.quantize_tree(params, uses=uses)
    is_weight = wanted[0] in ("product", "convolution", "look-up")
    assert isinstance(tree["w"], jp.QuantizedArray) == is_weight
    if is_weight:
        kept = (*wanted[1], *wanted[3])
        shape = [n if i - w.ndim in kept else 1 for i, n in enumerate(w.shape)]
        assert list(tree["w"].scale.shape) == shape
    want = fn(jp.dequantize_tree(tree), X)
    np.testing.assert_allclose(
        jp.compressed(fn)(tree, X), want, atol=2e-3 * float(jnp.abs(want).max())
    )


def test_bytes_of_attention_kernels():
    d, h, k = 768, 12, 64
    params = {"q": jnp.ones((d, h, k)), "o": jnp.ones((h, k, d))}
    fn = lambda p, x: jnp.einsum("bhk,hkd->bd", jnp.einsum("bd,dhk->bhk", x, p["q"]), p["o"])
    uses = jp.uses(fn, params, jnp.ones((1, d)))
    for tree, most in (
        (jp.quantize_tree(params, uses=uses), 1.01),
        (jp.quantize_tree(params, bits=4, group_size=32, uses=uses), 0.63),
    ):
        for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jp.QuantizedArray)):
            assert leaf.nbytes / leaf.size <= most
    named = {"attention": {"query": {"kernel": params["q"]}, "out": {"kernel": params["o"]}}}
    for leaf in jax.tree.leaves(
        jp.quantize_tree(named), is_leaf=lambda x: isinstance(x, jp.QuantizedArray)
    ):
        assert leaf.nbytes / leaf.size <= 1.01


NO_WEIGHTS = {
    "bias of heads": ({"attention": {"kernel": normal(8, 2, 4), "bias": normal(2, 4)}}, "bias"),
    "stacked norm": ({"norm": {"scale": normal(3, 8)}, "w": STACK}, "scale"),
    "torch-like norm": ({"ln_1": {"weight": normal(3, 8)}, "w": STACK}, "ln_1"),
    "norm by its own name": ({"attn_norm": normal(3, 8), "wq": STACK}, "norm"),
    "haiku": ({"linear": {"w": STACK, "b": normal(3, 8)}}, "['b']"),
    "statistics": ({"bn": {"mean": normal(3, 8), "var": normal(3, 8)}, "w": STACK}, "bn"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_biases_and_norms_stay_out_by_default(name):
    tree, odd = NO_WEIGHTS[name]
    is_odd = lambda path: odd in jax.tree_util.keystr(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = jp.quantize_tree(tree)
        _, masks = jp.prune_tree(tree, 0.5)
        clustered = jp.cluster_tree(tree, bits=2)
        prepared = jp.qat.prepare(tree)
    for result in (quantized, clustered, prepared):
        for path, leaf in jax.tree.leaves_with_path(
            result, is_leaf=lambda x: hasattr(x, "materialize")
        ):
            assert hasattr(leaf, "materialize") != is_odd(path), path
    for path, mask in jax.tree.leaves_with_path(masks):
        assert (mask.ndim == 0) == is_odd(path), path


def test_names_that_only_look_like_biases_are_weights():
    params = {
        "lora_b": normal(4, 8),
        "b": normal(8, 4),
        "lora_a": normal(8, 4),
        "mean": normal(4, 4),
    }
    _, masks = jp.prune_tree(params, 0.5)
    assert all(mask.ndim == 2 for mask in masks.values())


def test_ambiguity_is_told_once_with_the_cure():
    params = {"a": normal(4, 8, 8), "w": W, "c": normal(6, 8, 8)}
    with pytest.warns(UserWarning, match=r"2 leaves.*'a' \(4, 8, 8\).*jp.uses\(fn") as seen:
        jp.quantize_tree(params)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.quantize_tree({"w": W, "conv": normal(3, 3, 4, 8)})
        jp.quantize_tree(params, channel_axis=-1)


def test_masks_by_uses():
    params = {"q": normal(8, 2, 4), "w": STACK, "b": normal(2, 4), "t": normal(6, 8)}

    def fn(p, x):
        h = LAYERS(lambda h, w: h @ w)(p, x)
        return (jnp.einsum("bd,dhk->bhk", h, p["q"]) + p["b"]).reshape(2, 8) @ p["t"].T

    uses = jp.uses(fn, params, X)
    _, masks = jp.prune_tree(params, 0.5, pattern=jp.masks.NM(2, 4), uses=uses)
    assert masks["b"].ndim == 0
    assert (masks["q"].reshape(2, 4, 8).sum(1) == 2).all()  # along D, not along heads
    assert (masks["t"].reshape(6, 2, 4).sum(-1) == 2).all()
    assert (masks["w"].reshape(3, 2, 4, 8).sum(2) == 2).all()
    scaled = {**params, "w": STACK * jnp.array([1.0, 1e-2, 1e-4]).reshape(3, 1, 1)}
    _, masks = jp.prune_tree(scaled, 0.5, scope="leaf", uses=uses)
    assert masks["w"].sum((1, 2)).tolist() == [32, 32, 32]  # each layer as if it were alone
    one = jp.prune_tree({"w": scaled["w"][2]}, 0.5, scope="leaf")[1]["w"]
    np.testing.assert_array_equal(masks["w"][2], one)
    _, masks = jp.prune_tree(params, 0.5, pattern=jp.masks.Channel("free"), scope="leaf", uses=uses)
    assert masks["q"].shape == (1, 2, 4)
    assert masks["t"].shape == (6, 1)
    sparse = jp.sparsify_tree(
        jp.prune_tree(params, 0.5, pattern=jp.masks.NM(2, 4), uses=uses)[0], uses=uses
    )
    assert isinstance(sparse["q"], jp.SparseArray)
    assert (sparse["q"].axis, sparse["t"].axis) == (-3, -1)


def test_gradual_by_uses_is_prune_tree():
    params = {"q": normal(8, 2, 4), "b": normal(2, 4)}
    uses = jp.uses(lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["q"]) + p["b"], params, X)
    pattern = jp.masks.NM(2, 4)
    tx = jp.optim.gradual(optax.sgd(0.0), jp.schedules.one_shot(0.5), pattern=pattern, uses=uses)
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    wanted = jp.prune_tree(params, 0.5, pattern=pattern, uses=uses)[0]
    got = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(got["q"], wanted["q"])
    np.testing.assert_array_equal(got["b"], params["b"])


def test_budgets_by_uses():
    stacked, single = {"a": normal(3, 8, 8), "b": normal(8, 16)}, {"a": W, "b": normal(8, 16)}
    fn = lambda p, x: LAYERS(lambda h, w: h @ w)({"w": p["a"]}, x) @ p["b"]
    uses = jp.uses(fn, stacked, X)
    layers = {f"a{i}": W for i in range(3)} | {"b": normal(8, 16)}
    got, want = jp.budgets.erk(stacked, 0.6, uses=uses), jp.budgets.erk(layers, 0.6)
    assert got["a"] == pytest.approx(want["a0"])
    assert got["b"] == pytest.approx(want["b"])
    assert jp.budgets.uniform({**single, "c": W}, 0.5, uses=None)["c"] == 0.5


def test_clusters_and_factors_by_uses():
    scaled = {"w": STACK * jnp.array([1.0, 1e-2, 1e-4]).reshape(3, 1, 1), "q": normal(8, 4, 4)}

    def fn(p, x):
        return jnp.einsum("bd,dhk->bhk", LAYERS(lambda h, w: h @ w)(p, x), p["q"])

    uses = jp.uses(fn, scaled, X)
    tree = jp.cluster_tree(scaled, bits=3, uses=uses)
    dense = jp.materialize_tree(tree)["w"]
    assert all(relative(dense[i], scaled["w"][i]) < 0.3 for i in range(3))
    want = fn(jp.materialize_tree(tree), X)
    np.testing.assert_allclose(jp.compressed(fn)(tree, X), want, atol=2e-3 * float(abs(want).max()))
    factors = jp.factorize_tree(scaled, rank=2, uses=uses)
    assert factors["w"].batch == 1
    assert factors["q"].batch == 0
    assert (factors["q"].left.shape, factors["q"].right.shape) == ((8, 2), (2, 4, 4))
    with pytest.raises(ValueError, match="bits, clusters"):
        jp.cluster_tree(scaled, bits=2, clusters=3)


def test_statistics_and_graphs_carry_uses():
    params = {"q": normal(8, 2, 4), "b": normal(2, 4)}
    fn = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["q"]) + p["b"]
    uses = jp.uses(fn, params, X)
    stats, graph = jp.calibrate(fn, params, [X]), jp.trace(fn, params, X)
    want = jp.quantize_tree(params, uses=uses)["q"]
    for carrier in (stats, graph):
        got = jp.quantize_tree(params, uses=carrier)["q"]
        np.testing.assert_array_equal(got.scale, want.scale)
    acted = jp.quantize_activations(jp.quantize_tree(params, uses=stats), stats)
    assert isinstance(acted["q"], jp.quantize.ActivationQuantized)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, u: jp.quantize_tree(p, uses=u),
        lambda p, u: jp.qat.prepare(p, uses=u),
        lambda p, u: jp.fake_quantize_tree(p, uses=u),
        lambda p, u: jp.cluster_tree(p, uses=u),
        lambda p, u: jp.factorize_tree(p, rank=1, uses=u),
        lambda p, u: jp.prune_tree(p, 0.5, uses=u),
        lambda p, u: jp.masks.from_scores(jp.scores.magnitude(p), 0.5, uses=u),
        lambda p, u: jp.sparsify_tree(p, uses=u),
        lambda p, u: jp.budgets.erk(p, 0.5, uses=u),
        lambda p, u: jp.budgets.uniform(p, 0.5, uses=u),
        lambda p, u: jp.optim.gradual(optax.sgd(0.1), jp.schedules.one_shot(0.5), uses=u).init(p),
    ],
)
def test_uses_of_another_tree_are_refused(call):
    other = jp.uses(lambda p, x: x @ p["v"], {"v": W}, X)
    with pytest.raises(ValueError, match=r"uses: of another tree.*jp.uses\(fn"):
        call({"w": W}, other)
    with pytest.raises(TypeError, match="uses: expected jp.uses"):
        call({"w": W}, {"w": 3})
