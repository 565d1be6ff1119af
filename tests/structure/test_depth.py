"""Layers of residual networks: found, scored, masked, and gone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from tests.structure._zoo import TOKENS, ZOO, build, normal, randomized
from tests.structure.test_compact import assert_close

COUNTS = {
    "transformer": 4,
    "residual": 1,
    "mixer": 2,
    "windows_and_shifts": 1,
    "inverted_residual": 2,
    "convnext_block": 1,
    "vision_transformer": 2,
    "parallel_block_and_interleaved_rotary": 2,
    "nnx_transformer": 4,
    "scanned_residual_stream": 3,
    "swin_block_with_relative_bias": 1,
    "post_norm_encoder": 4,
    "temporal_convolution": 2,
}


def squared(output):
    return jnp.sum(jnp.square(output))


@pytest.mark.parametrize("name", COUNTS)
def test_layers_vanish(name):
    fn, params, x = build(name)
    graph = jp.trace(fn, params, x)
    found = jp.structure.layers(graph)
    assert len(found) == COUNTS[name]
    assert len({layer.name for layer in found}) == len(found)
    dense, full = graph.cost().flops, jax.jit(fn)
    for layer in found:
        scores = {other.name: float(other.name != layer.name) for other in found}
        masks = jp.structure.layer_masks(graph, layer_scores=scores, count=1)
        compact_fn, small = jp.compact(fn, params, masks, x, verify=True)
        twice = jnp.concatenate([x, x[::-1]])
        assert_close(full(jp.apply_masks(params, masks), twice), jax.jit(compact_fn)(small, twice))
        cost = jp.trace(compact_fn, small, x).cost()
        assert cost.flops < dense
        assert cost.flops == pytest.approx(graph.cost(masks).flops)
        gone = [i for i, index in layer.leaves if index is None]
        leaves = jax.tree.leaves(small)
        assert all(leaves[i].size == 0 for i in gone)
        assert all(
            leaves[i].shape[0] == graph.shapes[i][0] - 1 for i, k in layer.leaves if k is not None
        )


def test_only_branches_around_which_something_goes():
    none = [name for name in ZOO if name not in COUNTS]
    for name in ("mlp", "shared_block", "unet", "lstm", "carry_that_stops_being_zero"):
        assert name in none
        fn, params, x = build(name)
        assert not jp.structure.layers(jp.trace(fn, params, x))
    with pytest.raises(ValueError, match="no layer may go"):
        jp.structure.layer_masks(jp.trace(fn, params, x), jp.scores.magnitude(params), count=1)


def test_a_removed_layer_costs_what_a_shallower_network_costs():
    def network(depth):
        def fn(p, x):
            y = x @ p["in"]
            for i in range(depth):
                y = (
                    y
                    + jnp.tanh(y @ p["layers"][i]["up"] + p["layers"][i]["b"])
                    @ p["layers"][i]["down"]
                )
            return y @ p["out"]

        layer = {"up": jnp.ones((8, 16)), "b": jnp.ones(16), "down": jnp.ones((16, 8))}
        return fn, {"in": jnp.ones((5, 8)), "layers": [layer] * depth, "out": jnp.ones((8, 3))}

    fn, params = network(4)
    params, x = randomized(params), normal(2, 5)
    graph = jp.trace(fn, params, x)
    names = [layer.name for layer in jp.structure.layers(graph)]
    masks = jp.structure.layer_masks(
        graph, layer_scores={n: i for i, n in enumerate(names)}, count=2
    )
    compact_fn, small = jp.compact(fn, params, masks, x)
    shallow, kept = network(2)
    kept = {**params, "layers": params["layers"][2:]}
    assert_close(shallow(kept, x), compact_fn(small, x), 1e-6)
    found, wanted = jp.trace(compact_fn, small, x).cost(), jp.trace(shallow, kept, x).cost()
    assert (found.flops, found.activation_bytes) == (wanted.flops, wanted.activation_bytes)
    assert jp.nbytes(small) == jp.nbytes(kept)


def stream_network():
    """Three layers, of which the second changes the stream least."""

    def fn(p, x):
        for name in "abc":
            x = x + jnp.tanh(x @ p[name])
        return x

    rng = np.random.default_rng(0)
    scale = {"a": 1.0, "b": 0.01, "c": 0.5}
    draw = lambda s: jnp.asarray(s * rng.standard_normal((6, 6)), jnp.float32)
    return fn, {name: draw(s) for name, s in scale.items()}, normal(4, 6)


def scanned_stream_network():
    fn, params, x = stream_network()
    stacked = {"w": jnp.stack(list(params.values()))}
    return (
        lambda p, x: jax.lax.scan(lambda y, w: (y + jnp.tanh(y @ w), None), x, p["w"])[0],
        stacked,
        x,
    )


@pytest.mark.parametrize("make", [stream_network, scanned_stream_network])
@pytest.mark.parametrize("by", ["influence", "angular", "loss", "magnitude"])
def test_scores(make, by):
    fn, params, x = make()
    graph = jp.trace(fn, params, x)
    target = fn(params, x)
    loss = lambda out: jnp.mean(jnp.square(out - target))
    scores = jp.structure.layer_scores(graph, params, x, by=by, loss=loss)
    assert len(scores) == 3
    assert min(scores, key=scores.get) == list(scores)[1]
    masks = jp.structure.layer_masks(graph, layer_scores=scores, count=1)
    dense = dict(zip("abc", jax.tree.leaves(stream_network()[1]), strict=True))
    dense["b"] = jnp.zeros((6, 6))
    compact_fn, small = jp.compact(fn, params, masks, x, verify=True)
    assert_close(stream_network()[0](dense, x), compact_fn(small, x))


def test_scores_against_numpy():
    fn, params, x = stream_network()
    graph = jp.trace(fn, params, x)
    stream = [np.asarray(x, np.float64)]
    for name in "abc":
        stream.append(stream[-1] + np.tanh(stream[-1] @ np.asarray(params[name], np.float64)))

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    influence = jp.structure.layer_scores(graph, params, x)
    angular = jp.structure.layer_scores(graph, params, x, by="angular", span=2)
    assert len(angular) == 2
    for i, value in enumerate(influence.values()):
        assert value == pytest.approx((1 - cosine(stream[i], stream[i + 1])).mean(), abs=1e-5)
    for i, value in enumerate(angular.values()):
        expected = (np.arccos(cosine(stream[i], stream[i + 2])) / np.pi).mean()
        assert value == pytest.approx(expected, rel=1e-4)


class TestLayerMasks:
    @pytest.fixture
    def traced(self):
        fn, params, x = build("transformer")
        return fn, params, x, jp.trace(fn, params, x)

    def test_targets(self, traced):
        _, params, x, graph = traced
        scores = jp.structure.layer_scores(graph, params, x)
        count = lambda masks: sum(not np.any(np.asarray(mask)) for mask in jax.tree.leaves(masks))
        assert count(jp.structure.layer_masks(graph, layer_scores=scores, sparsity=0)) == 0
        half = jp.structure.layer_masks(graph, layer_scores=scores, sparsity=0.5)
        assert count(half) in (12, 16, 20)
        cut = jp.structure.layer_masks(graph, layer_scores=scores, flops=0.6)
        assert graph.cost(cut).flops <= 0.6 * graph.cost().flops
        everything = jp.structure.layer_masks(graph, layer_scores=scores, count=4)
        assert graph.cost(everything).flops < 0.1 * graph.cost().flops

    def test_pattern_joins_branches(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
                return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))

        class Net(nn.Module):
            @nn.compact
            def __call__(self, t):
                x = nn.Embed(30, 8)(t)
                for i in range(3):
                    x = Layer(name=f"layer_{i}")(x)
                return nn.Dense(4)(x)

        params = randomized(Net().init(jax.random.key(0), TOKENS))
        graph = jp.trace(Net().apply, params, TOKENS)
        assert len(jp.structure.layers(graph)) == 6
        found = jp.structure.layers(graph, pattern=r"layer_\d+")
        assert [layer.name for layer in found] == ["layer_0", "layer_1", "layer_2"]
        scores = jp.structure.layer_scores(graph, params, TOKENS, pattern=r"layer_\d+")
        masks = jp.structure.layer_masks(
            graph, layer_scores=scores, count=1, pattern=r"layer_\d+", ignore=["layer_0"]
        )
        _, small = jp.compact(Net().apply, params, masks, TOKENS, verify=True)
        sizes = {
            name: sum(v.size for v in jax.tree.leaves(small["params"][name])) for name in scores
        }
        assert sorted(bool(v) for v in sizes.values()) == [False, True, True]
        assert sizes["layer_0"]

    def test_contiguous(self, traced):
        _, params, x, graph = traced
        names = [layer.name for layer in jp.structure.layers(graph)]
        scores = jp.structure.layer_scores(graph, params, x, span=2)
        masks = jp.structure.layer_masks(graph, layer_scores=scores, count=2, contiguous=True)
        first = names.index(min(scores, key=scores.get))
        both = {**dict.fromkeys(names, 1.0), names[first]: 0.0, names[first + 1]: 0.0}
        expected = jp.structure.layer_masks(graph, layer_scores=both, count=2)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), masks, expected))

    def test_flax_scan(self):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                stack = nn.scan(
                    nn.remat(Block),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=5,
                )
                return nn.Dense(3)(stack(name="stack")(nn.Dense(8)(x), None)[0])

        x = normal(2, 6)
        params = randomized(Net().init(jax.random.key(0), x))
        graph = jp.trace(Net().apply, params, x)
        scores = jp.structure.layer_scores(graph, params, x)
        assert len(scores) == 5
        masks = jp.structure.layer_masks(graph, layer_scores=scores, count=2)
        compact_fn, small = jp.compact(Net().apply, params, masks, x, verify=True)
        assert small["params"]["stack"]["Dense_0"]["kernel"].shape == (3, 16, 8)
        assert_close(
            jax.jit(jax.grad(lambda p: squared(compact_fn(p, x))))(small)["params"]["Dense_1"],
            jax.grad(lambda p: squared(Net().apply(p, x)))(jp.apply_masks(params, masks))["params"][
                "Dense_1"
            ],
        )

    def test_bad_input(self, traced):
        _, params, x, graph = traced
        scores = jp.structure.layer_scores(graph, params, x)
        masks = jp.structure.layer_masks
        for kw in ({}, {"count": 1, "sparsity": 0.5}):
            with pytest.raises(ValueError, match="expected one of"):
                masks(graph, layer_scores=scores, **kw)
        with pytest.raises(ValueError, match="count"):
            masks(graph, layer_scores=scores, count=5)
        with pytest.raises(ValueError, match="out of reach"):
            masks(graph, layer_scores=scores, flops=0.0)
        with pytest.raises(ValueError, match="no score of layer"):
            masks(graph, layer_scores=dict(list(scores.items())[:2]), count=1)
        for given in ((), (scores,)):  # neither, or one kind in the place of the other
            with pytest.raises(ValueError, match="scores"):
                masks(graph, *given, count=1)
        with pytest.raises(ValueError, match="ignore"):
            masks(graph, layer_scores=scores, count=1, ignore=["nothing"])
        with pytest.raises(ValueError, match="pattern"):
            masks(graph, layer_scores=scores, count=1, pattern="nothing")
        with pytest.raises(ValueError, match="loss"):
            jp.structure.layer_scores(graph, params, x, by="loss")
        with pytest.raises(ValueError, match="by"):
            jp.structure.layer_scores(graph, params, x, by="colour")
