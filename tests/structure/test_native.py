"""Native configurations that masks leave: widths by kind, layers, and the same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxprune as jp

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 5)))
SIZES = {"num_heads": 4, "num_kv_heads": 2, "mlp": 24, "layers": 3}
WIDTH, HEAD = 16, 4


def rope(x):
    half = HEAD // 2
    angle = jnp.arange(x.shape[1])[:, None, None] / 10.0 ** jnp.arange(half)
    a, b = x[..., :half], x[..., half:]
    turned = a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)
    return jnp.concatenate(turned, -1)


class Block(nn.Module):
    """MaxText's names; Gemma's gated GELU."""

    num_heads: int
    num_kv_heads: int
    mlp: int

    @nn.compact
    def __call__(self, x, _):
        heads = lambda n, name: nn.DenseGeneral((n, HEAD), use_bias=False, name=name)
        dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)
        h = nn.RMSNorm(name="pre_attention_norm")(x)
        q, k, v = (
            heads(n, name)(h)
            for n, name in (
                (self.num_heads, "query"), (self.num_kv_heads, "key"), (self.num_kv_heads, "value")
            )
        )  # fmt: skip
        y = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="out")(y)
        h = nn.RMSNorm(name="pre_mlp_norm")(x)
        h = nn.gelu(dense(self.mlp, "wi_0")(h)) * dense(self.mlp, "wi_1")(h)
        return x + dense(WIDTH, "wo")(h), None


class Decoder(nn.Module):
    num_heads: int
    num_kv_heads: int
    mlp: int
    layers: int
    scanned: bool = True

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(20, WIDTH, name="embed")
        x, sizes = embedding(tokens), (self.num_heads, self.num_kv_heads, self.mlp)
        if self.scanned:
            stack = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
            )
            x, _ = stack(*sizes, name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = Block(*sizes, name=f"layers_{i}")(x, None)
        return embedding.attend(nn.RMSNorm(name="norm")(x))


class Attention(nnx.Module):
    """As in Qwen3: queries and keys are normalized head by head."""

    def __init__(self, num_heads, num_kv_heads, rngs):
        make = lambda n: nnx.LinearGeneral(WIDTH, (n, HEAD), use_bias=False, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj = (
            make(num_heads),
            *(make(num_kv_heads) for _ in range(2)),
        )
        self.o_proj = nnx.LinearGeneral(
            (num_heads, HEAD), WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs
        )
        self.q_norm, self.k_norm = (nnx.RMSNorm(HEAD, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        q, k = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        n, t, kv, _ = k.shape
        q = rope(q).reshape(n, t, kv, -1, HEAD)
        weights = jnp.einsum("btkgd,bskd->bkgts", q, rope(k)) / HEAD**0.5
        weights = jnp.where(jnp.tril(jnp.ones((t, t), bool)), weights, -1e9)
        y = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(weights, -1), self.v_proj(x))
        return self.o_proj(y.reshape(n, t, -1, HEAD))


class Layer(nnx.Module):
    def __init__(self, num_heads, num_kv_heads, mlp, rngs):
        self.norm, self.mlp_norm = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attn = Attention(num_heads, num_kv_heads, rngs)
        self.gate, self.up = (nnx.Linear(WIDTH, mlp, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(mlp, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        h = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Qwen(nnx.Module):
    def __init__(self, *, num_heads, num_kv_heads, mlp, layers):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(20, WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(num_heads, num_kv_heads, mlp, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


def qwen(**sizes):
    return nnx.split(Qwen(**sizes))


def both_masks(fn, params, sparsity=0.5, pattern=None):
    graph = jp.trace(fn, params, TOKENS)
    by_layer = jp.structure.layer_scores(graph, params, TOKENS, by="kl", pattern=pattern)
    depth = jp.structure.layer_masks(graph, layer_scores=by_layer, count=1, pattern=pattern)
    scores = jp.scores.random(params, jax.random.key(3))
    only = ["kv heads", "neurons"]
    width = jp.structure.unit_masks(graph, scores, sparsity=sparsity, scope="leaf", only=only)
    return graph, jax.tree.map(jnp.logical_and, depth, width)


def test_scanned_linen_decoder():
    module = Decoder(**SIZES)
    params = module.init(jax.random.key(1), TOKENS)
    graph, masks = both_masks(module.apply, params)
    sizes = jp.structure.widths(graph, masks, by="kind")
    assert sizes == {
        "embed": WIDTH, "head_dim": HEAD, "num_heads": 2, "num_kv_heads": 1, "mlp": 12, "layers": 2
    }  # fmt: skip
    _, small = jp.compact(module.apply, params, masks, TOKENS)
    native = Decoder(**{name: sizes[name] for name in SIZES})
    expected = jax.tree.map(jnp.shape, native.init(jax.random.key(0), TOKENS))
    assert jax.tree.map(jnp.shape, small) == expected
    masked = module.apply(jp.apply_masks(params, masks), TOKENS)
    np.testing.assert_allclose(native.apply(small, TOKENS), masked, atol=1e-5)
    names = jp.structure.layer_map(graph, masks)
    kept = np.flatnonzero(np.asarray(masks["params"]["layers"]["wo"]["kernel"]).any((1, 2)))
    stem = "params/layers"
    assert names == {f"{stem}[{i}]": f"{stem}[{j}]" for i, j in enumerate(kept)}


def test_unrolled_linen_and_nnx_decoders():
    module = Decoder(**SIZES, scanned=False)
    params = module.init(jax.random.key(1), TOKENS)
    graph, masks = both_masks(module.apply, params, pattern=r"layers_\d+")
    sizes = jp.structure.widths(graph, masks, by="kind")
    _, small = jp.compact(module.apply, params, masks, TOKENS)
    rest = {k: v for k, v in small["params"].items() if not k.startswith("layers_")}
    names = jp.structure.layer_map(graph, masks, pattern=r"layers_\d+")
    rest |= {f"layers_{i}": small["params"][old] for i, old in enumerate(names.values())}
    native = Decoder(**{name: sizes[name] for name in SIZES}, scanned=False)
    masked = module.apply(jp.apply_masks(params, masks), TOKENS)
    np.testing.assert_allclose(native.apply({"params": rest}, TOKENS), masked, atol=1e-5)

    definition, state = qwen(**SIZES)
    fn = lambda state, x: nnx.merge(definition, state)(x)
    graph, masks = both_masks(fn, state, pattern=r"layers/\d+")
    sizes = jp.structure.widths(graph, masks, by="kind")
    assert {name: sizes[name] for name in SIZES} == {
        "num_heads": 2, "num_kv_heads": 1, "mlp": 12, "layers": 2
    }  # fmt: skip
    _, small = jp.compact(fn, state, masks, TOKENS)
    pure = nnx.to_pure_dict(small)
    names = jp.structure.layer_map(graph, masks, pattern=r"layers/\d+")
    pure["layers"] = {
        i: pure["layers"][int(old.rpartition("/")[2])] for i, old in enumerate(names.values())
    }
    native_definition, state_of_native = qwen(**{name: sizes[name] for name in SIZES})
    nnx.replace_by_pure_dict(state_of_native, pure)
    out = nnx.merge(native_definition, state_of_native)(TOKENS)
    np.testing.assert_allclose(out, fn(jp.apply_masks(state, masks), TOKENS), atol=1e-5)


def two_blocks(p, x):
    for i in "ab":
        x = x + jnp.tanh(x @ p[f"{i}/up"]) @ p[f"{i}/down"]
    return x @ p["out"]


def blocks():
    rng = np.random.default_rng(0)
    shapes = {"a/up": (4, 8), "a/down": (8, 4), "b/up": (4, 8), "b/down": (8, 4), "out": (4, 3)}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def test_widths_that_differ_are_told():
    params, x = blocks(), jnp.ones((2, 4))
    graph = jp.trace(two_blocks, params, x)
    keep = {"a/up[1]": np.arange(8) < 5}
    masks = jp.structure.keep_units(graph, keep)
    assert jp.structure.widths(graph, masks, by="label")["a/neurons"] == 5
    with pytest.raises(ValueError, match=r"neurons differ \(a/neurons: 5.*scope=\"leaf\""):
        jp.structure.widths(graph, masks, by="kind")
    with pytest.raises(ValueError, match="by"):
        jp.structure.widths(graph, masks, by="size")


def test_candidates_meet_the_target_and_tell_the_damage():
    params, x = blocks(), jax.random.normal(jax.random.key(0), (6, 4))
    graph = jp.trace(two_blocks, params, x)
    by_layer = jp.structure.layer_scores(graph, params, x, by="kl")
    how = {"layer_scores": by_layer, "scores": jp.scores.magnitude(params), "only": "neurons"}
    found = jp.structure.candidates(graph, params, x, params=0.6, **how)
    assert {c.layers for c in found} == {0, 1}
    assert [c.damage for c in found] == sorted(c.damage for c in found)
    dense = jax.nn.log_softmax(two_blocks(params, x))
    for c in found:
        small, own = jp.compact(two_blocks, params, c.masks, x)
        left = sum(leaf.size for leaf in jax.tree.leaves(own)) / 140
        assert left == pytest.approx(c.params) and left <= 0.6  # noqa: PT018
        other = jax.nn.log_softmax(small(own, x))
        kl = np.mean(np.sum(np.exp(dense) * (dense - other), -1))
        assert c.damage == pytest.approx(float(kl), rel=1e-3)
    with pytest.raises(ValueError, match="out of reach"):
        jp.structure.candidates(graph, params, x, params=0.01, **how)
    with pytest.raises(ValueError, match="params= and flops="):
        jp.structure.candidates(graph, params, x, **how)


@pytest.mark.parametrize("by", ["max", "rms"])
def test_activations_alone(by):
    params, x = blocks(), jax.random.normal(jax.random.key(0), (6, 4))
    graph, stats = jp.trace(two_blocks, params, x), jp.calibrate(two_blocks, params, [x])
    found = jp.structure.activation_scores(graph, params, stats, by=by, only="neurons")
    hidden = np.abs(np.tanh(x @ params["a/up"]))
    expected = hidden.max(0) if by == "max" else np.sqrt((hidden**2).mean(0))
    np.testing.assert_allclose(found["a/up[1]"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="centered"):
        jp.structure.activation_scores(graph, params, stats, by=by, centered=True)


def test_divergence_needs_logits():
    params, x = blocks(), jnp.ones((2, 4))
    graph = jp.trace(lambda p, x: {"y": two_blocks(p, x)}, params, x)
    with pytest.raises(ValueError, match="array of logits"):
        jp.structure.layer_scores(graph, params, x, by="kl")
