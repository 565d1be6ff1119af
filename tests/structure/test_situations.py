"""The situations of Torch-Pruning's users, one by one: what goes, and that removed equals masked.

The first table of docs/coverage.md is what these tests find, see `tests._tables`.
"""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp
from tests._tables import row
from tests.structure._zoo import normal

relu = jax.nn.relu
IMAGES = normal(2, 8, 8, 4)
SITUATIONS = {}


def situation(title):
    def add(make):
        SITUATIONS[title] = make
        return make

    return add


def conv(x, w, groups=1, stride=1, dilation=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def draw(**shapes):
    return {k: 0.5 * normal(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}


def linen(body, x):
    """`(fn, params, x)` of the body of a compact module."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, *args):
            return body(*args)

    net, args = Net(), x if isinstance(x, tuple) else (x,)
    return net.apply, net.init(jax.random.key(0), *args), x


@situation("fully connected layers")
def fully_connected():
    fn = lambda p, x: relu(relu(x @ p["a"] + p["b"]) @ p["c"]) @ p["d"]
    return fn, draw(a=(4, 12), b=(12,), c=(12, 8), d=(8, 3)), normal(5, 4)


@situation("convolutions, flattened into a classifier (LeNet)")
def lenet():
    def body(x):
        x = nn.max_pool(relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.max_pool(relu(nn.Conv(12, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(relu(nn.Dense(16)(x.reshape(x.shape[0], -1))))

    return linen(body, IMAGES)


@situation("concatenation")
def concatenation():
    def fn(p, x):
        return conv(jnp.concatenate([relu(conv(x, p["a"])), relu(conv(x, p["b"]))], -1), p["c"])

    return fn, draw(a=(3, 3, 4, 8), b=(1, 1, 4, 6), c=(3, 3, 14, 3)), IMAGES


@situation("cascaded concatenation")
def cascaded():
    def fn(p, x):
        a = relu(conv(x, p["a"]))
        ab = jnp.concatenate([a, relu(conv(a, p["b"]))], -1)
        abc = jnp.concatenate([ab, relu(conv(ab, p["c"])), a], -1)
        return conv(abc, p["d"])

    shapes = {"a": (3, 3, 4, 6), "b": (3, 3, 6, 6), "c": (3, 3, 12, 6), "d": (1, 1, 24, 3)}
    return fn, draw(**shapes), IMAGES


@situation("concatenation, then split")
def concatenation_and_split():
    def fn(p, x):
        both = jnp.concatenate([relu(conv(x, p["a"])), relu(conv(x, p["b"]))], -1)
        left, right = jnp.split(both, [6], -1)
        return conv(left, p["c"]) + conv(right, p["d"])

    shapes = {"a": (3, 3, 4, 8), "b": (3, 3, 4, 6), "c": (1, 1, 6, 3), "d": (1, 1, 8, 3)}
    return fn, draw(**shapes), IMAGES


@situation("split and chunk")
def split():
    def fn(p, x):
        parts = jnp.split(relu(conv(x, p["a"])), 3, -1)
        return sum(conv(part, p[name]) for part, name in zip(parts, "bcd", strict=True))

    shapes = {"a": (3, 3, 4, 12), "b": (1, 1, 4, 3), "c": (1, 1, 4, 3), "d": (1, 1, 4, 3)}
    return fn, draw(**shapes), IMAGES


@situation("concatenation along space")
def concatenation_along_space():
    def fn(p, x):
        y = jnp.concatenate([relu(conv(x, p["a"])), relu(conv(x[:, ::-1], p["a"]))], 1)
        return conv(y, p["b"])

    return fn, draw(a=(3, 3, 4, 8), b=(3, 3, 8, 3)), IMAGES


@situation("reshape, permute, flatten")
def reshape():
    def fn(p, x):
        y = jnp.moveaxis(relu(conv(x, p["a"])), -1, 1)  # (batch, channels, height, width)
        y = y.reshape(*y.shape[:2], -1)
        return jnp.swapaxes(y, 1, 2).reshape(y.shape[0], -1) @ p["b"]

    return fn, draw(a=(3, 3, 4, 8), b=(512, 3)), IMAGES


@situation("residual blocks with BatchNorm")
def residual_blocks():
    def body(x):
        norm = lambda x: nn.BatchNorm(use_running_average=True)(x)
        x = relu(norm(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for width in (8, 12):
            y = relu(norm(nn.Conv(6, (3, 3))(x)))
            y = norm(nn.Conv(width, (3, 3))(y))
            x = relu(y + (x if width == 8 else nn.Conv(width, (1, 1))(x)))
        return nn.Dense(3)(x.mean((1, 2)))

    return linen(body, IMAGES)


@situation("depthwise convolution")
def depthwise():
    fn = lambda p, x: conv(relu(conv(relu(conv(x, p["a"])), p["b"], groups=8)), p["c"])
    return fn, draw(a=(1, 1, 4, 8), b=(3, 3, 1, 8), c=(1, 1, 8, 3)), IMAGES


@situation("grouped convolution")
def grouped():
    fn = lambda p, x: conv(relu(conv(relu(conv(x, p["a"])), p["b"], groups=4)), p["c"])
    return fn, draw(a=(1, 1, 4, 16), b=(3, 3, 4, 16), c=(1, 1, 16, 3)), IMAGES


@situation("transposed convolution")
def transposed():
    def body(x):
        y = relu(nn.ConvTranspose(8, (2, 2), (2, 2))(relu(nn.Conv(8, (3, 3))(x))))
        return nn.Conv(3, (3, 3))(y)

    return linen(body, IMAGES)


@situation("several inputs and outputs")
def several():
    def fn(p, xs):
        hidden = relu(xs[0] @ p["a"] + xs[1] @ p["b"])
        return {"one": hidden @ p["c"], "two": (hidden * hidden) @ p["d"]}

    shapes = {"a": (4, 10), "b": (3, 10), "c": (10, 2), "d": (10, 1)}
    return fn, draw(**shapes), [normal(5, 4), normal(5, 3, seed=1)]


@situation("a layer with one output channel")
def one_channel():
    def fn(p, x):
        y = relu(conv(x, p["a"]))
        return conv(y * jax.nn.sigmoid(conv(y, p["gate"])), p["b"])

    return fn, draw(a=(3, 3, 4, 8), gate=(1, 1, 8, 1), b=(1, 1, 8, 3)), IMAGES


@situation("parameters outside of layers")
def outside():
    fn = lambda p, x: (relu(x @ p["a"]) * p["scale"] + p["shift"]) @ p["b"]
    return fn, draw(a=(4, 8), scale=(8,), shift=(1, 8), b=(8, 3)), normal(5, 4)


@situation("unused parameters")
def unused():
    fn = lambda p, x: relu(x @ p["a"]) @ p["b"]
    return fn, draw(a=(4, 8), b=(8, 3), idle=(8, 8)), normal(5, 4)


@situation("a layer of one's own (custom gradient)")
def own_layer():
    @jax.custom_vjp
    def layer(x, w):
        return jnp.tanh(x) * w

    layer.defvjp(
        lambda x, w: (layer(x, w), (x, w)), lambda res, g: (g * res[1], (g * res[0]).sum(0))
    )
    fn = lambda p, x: layer(x @ p["a"], p["w"]) @ p["b"]
    return fn, draw(a=(4, 8), w=(8,), b=(8, 3)), normal(5, 4)


@situation("shared layers")
def shared():
    fn = lambda p, x: relu(relu(relu(x @ p["a"]) @ p["twice"]) @ p["twice"]) @ p["b"]
    return fn, draw(a=(4, 8), twice=(8, 8), b=(8, 3)), normal(5, 4)


@situation("attention heads")
def heads():
    def body(x):
        return nn.Dense(3)(x + nn.MultiHeadDotProductAttention(4, qkv_features=16)(x, x))

    return linen(body, normal(2, 5, 8))


@situation("grouped-query attention")
def grouped_query():
    def fn(p, x):
        q = jnp.einsum("btd,dgrh->btgrh", x, p["q"])
        k, v = (jnp.einsum("btd,dgh->btgh", x, p[n]) for n in "kv")
        weights = jax.nn.softmax(jnp.einsum("btgrh,bsgh->bgrts", q, k), -1)
        return x + jnp.einsum("bgrts,bsgh,grhd->btd", weights, v, p["o"])

    shapes = {"q": (8, 2, 3, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 3, 4, 8)}
    return fn, draw(**shapes), normal(2, 5, 8)


@situation("LSTM")
def lstm():
    return linen(lambda x: nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(8))(x)), normal(2, 5, 4))


@situation("embedding, LayerNorm, feed-forward")
def embedding():
    def body(x):
        x = nn.Dense(8)(nn.Embed(11, 8)(x))
        return nn.Dense(3)(x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))))

    return linen(body, jnp.arange(10).reshape(2, 5))


@situation("dilated convolution and PReLU")
def dilated():
    def fn(p, x):
        y = conv(x, p["a"], dilation=2)
        return conv(jnp.where(y > 0, y, p["slope"] * y), p["b"], stride=2)

    return fn, draw(a=(3, 3, 4, 8), slope=(8,), b=(3, 3, 8, 3)), IMAGES


@situation("GroupNorm")
def group_norm():
    fn = lambda x: nn.Conv(3, (1, 1))(relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x))))
    return linen(fn, IMAGES)


def difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(x).max()) for x, y in pairs)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("title", SITUATIONS)
def test_situation(title):
    fn, params, x = SITUATIONS[title]()
    args = x if isinstance(x, tuple) else (x,)
    graph = jp.trace(fn, params, *args)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5, scope="leaf")
    small_fn, small = jp.compact(fn, params, masks, *args, verify=True)
    masked = jp.apply_masks(params, masks)
    assert difference(jax.jit(fn)(masked, *args), jax.jit(small_fn)(small, *args)) < 1e-5
    grads = jax.grad(lambda p: sum(jnp.sum(y**2) for y in jax.tree.leaves(small_fn(p, *args))))(
        small
    )
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert count(small) < count(params)
    units = sum(group.size for group in graph.groups)
    row(
        "coverage.md",
        title,
        f"{len(graph.groups)}",
        f"{units}",
        f"{count(small) / count(params):.2f}",
    )


class TestWhatElseTheyTest:
    """Soft pruning, interactive pruning, ignored layers, iterations, serialization, FLOPs."""

    def network(self):
        return residual_blocks()

    def test_soft_then_hard(self):
        fn, params, x = self.network()
        graph = jp.trace(fn, params, x)
        masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5)
        soft = jp.apply_masks(params, masks)
        assert jax.tree.map(jnp.shape, soft) == jax.tree.map(jnp.shape, params)
        small_fn, small = jp.compact(fn, soft, masks, x)
        assert difference(fn(soft, x), small_fn(small, x)) < 1e-5

    def test_interactive(self):
        fn, params, x = self.network()
        graph = jp.trace(fn, params, x)
        group = max(graph.groups, key=lambda g: g.size)
        keep = np.arange(group.size) != 1
        masks = jp.structure.keep_units(graph, {group.name: keep})
        _, small = jp.compact(fn, params, masks, x)
        path, axis = group.members[0]
        sizes = dict(zip(graph.paths, map(np.shape, jax.tree.leaves(small)), strict=True))
        assert sizes[path][axis] == group.size - 1

    def test_iterations_reach_the_same_width(self):
        fn, params, x = self.network()
        graph = jp.trace(fn, params, x)
        once = jp.structure.unit_masks(
            graph, jp.scores.magnitude(params), sparsity=0.5, scope="leaf"
        )
        _, at_once = jp.compact(fn, params, once, x)
        for left in (0.75, 2 / 3):
            graph = jp.trace(fn, params, x)
            masks = jp.structure.unit_masks(
                graph, jp.scores.magnitude(params), sparsity=1 - left, scope="leaf"
            )
            fn, params = jp.compact(fn, params, masks, x)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, at_once)

    @pytest.mark.parametrize("score", ["magnitude", "lamp", "taylor", "fisher", "random"])
    def test_every_importance(self, score):
        fn, params, x = self.network()
        grads = jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(params)
        squares = jax.tree.map(jnp.square, grads)
        arguments = {"taylor": (grads,), "fisher": (squares,), "random": (jax.random.key(0),)}
        scores = getattr(jp.scores, score)(params, *arguments.get(score, ()))
        masks = jp.structure.unit_masks(jp.trace(fn, params, x), scores, flops=0.5)
        small_fn, small = jp.compact(fn, params, masks, x, verify=True)
        assert (
            jp.trace(small_fn, small, x).cost().flops <= 0.51 * jp.trace(fn, params, x).cost().flops
        )

    def test_ignored_layers_stay(self):
        fn, params, x = self.network()
        graph = jp.trace(fn, params, x)
        masks = jp.structure.unit_masks(
            graph, jp.scores.magnitude(params), sparsity=0.5, ignore="params/Conv_1/.*"
        )
        assert bool(jnp.all(masks["params"]["Conv_1"]["kernel"]))

    def test_pickled_and_saved(self, tmp_path):
        params, x = fully_connected()[1:]
        graph = jp.trace(top_level, params, x)
        masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5)
        pair = jp.compact(top_level, params, masks, x)
        small_fn, small = pickle.loads(pickle.dumps(pair))
        np.testing.assert_array_equal(small_fn(small, x), pair[0](pair[1], x))
        jp.export.save(tmp_path / "pair", pair)
        loaded_fn, loaded = jp.export.load(tmp_path / "pair")
        np.testing.assert_array_equal(loaded_fn.of(top_level)(loaded, x), pair[0](pair[1], x))


def top_level(p, x):
    return relu(relu(x @ p["a"] + p["b"]) @ p["c"]) @ p["d"]
