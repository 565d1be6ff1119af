"""Networks whose structure is worth pruning: name -> (function, parameters, inputs)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

ZOO = {}


def network(f):
    """Registers a function that returns a module or a function with parameters, and inputs."""
    ZOO[f.__name__] = f
    return f


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def randomized(params):
    """Weights without accidental zeros or ones; variances stay positive."""
    rng = np.random.default_rng(1)

    def draw(path, x):
        y = 0.3 * rng.standard_normal(x.shape) + (0.5 if x.ndim == 1 else 0.0)
        return jnp.asarray(np.abs(y) + 0.1 if "var" in jax.tree_util.keystr(path) else y, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def build(name):
    """`(fn, params, x)`."""
    made = ZOO[name]()
    if len(made) == 3:
        fn, params, x = made
        return fn, randomized(params), x
    module, x = made
    params = module.init(jax.random.key(0), x)
    return (lambda p, v: module.apply(p, v)), randomized(params), x


def linen(body):
    """A linen module of one compact function."""

    class Module(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(x)

    return Module()


IMAGE = normal(2, 8, 8, 3)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 6)))
SEQUENCE = normal(2, 6, 10)


@network
def mlp():
    return linen(lambda x: nn.Dense(4)(nn.relu(nn.Dense(16)(nn.tanh(nn.Dense(32)(x)))))), normal(
        2, 8
    )


@network
def sigmoid_mlp():
    return linen(lambda x: nn.Dense(4)(nn.sigmoid(nn.Dense(16)(x)))), normal(2, 8)


@network
def relu6_and_leaky():
    body = lambda x: nn.Dense(3)(nn.leaky_relu(nn.Dense(8)(nn.relu6(nn.Dense(8)(x)))))
    return linen(body), normal(2, 5)


@network
def flatten_cnn():
    def body(x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(12, (3, 3))(x)))
        return nn.Dense(4)(nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1))))

    return linen(body), IMAGE


@network
def residual():
    def block(x, n, stride):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        y = nn.relu(norm()(nn.Conv(n, (3, 3), (stride, stride))(x)))
        y = norm()(nn.Conv(n, (3, 3))(y))
        x = x if x.shape == y.shape else norm()(nn.Conv(n, (1, 1), (stride, stride))(x))
        return nn.relu(x + y)

    body = lambda x: nn.Dense(5)(block(block(block(x, 8, 1), 8, 1), 16, 2).mean((1, 2)))
    return linen(body), IMAGE


@network
def concat_of_concats():
    def body(x):
        a, b, c = nn.Conv(4, (3, 3))(x), nn.Conv(6, (3, 3))(x), nn.Conv(5, (1, 1))(x)
        y = jnp.concatenate([jnp.concatenate([a, b], -1), c], -1)
        return nn.Dense(3)(nn.relu(nn.Conv(7, (3, 3))(nn.relu(y))).mean((1, 2)))

    return linen(body), IMAGE


@network
def dense_block():
    def body(x):
        for _ in range(3):
            x = jnp.concatenate([x, nn.relu(nn.Conv(4, (3, 3))(x))], -1)
        return nn.Dense(3)(x.mean((1, 2)))

    return linen(body), IMAGE


@network
def depthwise():
    def body(x):
        x = nn.relu(nn.Conv(8, (1, 1))(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8)(x))
        return nn.Dense(3)(nn.Conv(6, (1, 1))(x).mean((1, 2)))

    return linen(body), IMAGE


@network
def grouped():
    def body(x):
        x = nn.relu(nn.Conv(8, (1, 1))(x))
        return nn.Dense(3)(nn.relu(nn.Conv(8, (3, 3), feature_group_count=2)(x)).mean((1, 2)))

    return linen(body), IMAGE


@network
def transposed_and_dilated():
    def body(x):
        x = nn.relu(nn.Conv(6, (3, 3), kernel_dilation=2)(x))
        x = nn.relu(nn.ConvTranspose(8, (3, 3), (2, 2))(x))
        return nn.Dense(3)(x.mean((1, 2)))

    return linen(body), IMAGE


@network
def three_dimensions():
    body = lambda x: nn.Dense(3)(
        nn.relu(nn.Conv(6, (3, 3, 3))(nn.Conv(4, (2, 2, 2))(x))).mean((1, 2, 3))
    )
    return linen(body), normal(2, 4, 4, 4, 2)


@network
def squeeze_excite():
    def body(x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        gate = nn.sigmoid(nn.Dense(8)(nn.relu(nn.Dense(4)(x.mean((1, 2))))))
        return nn.Dense(3)((x * gate[:, None, None]).mean((1, 2)))

    return linen(body), IMAGE


@network
def group_and_instance_norm():
    def body(x):
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x)))
        x = nn.relu(nn.InstanceNorm()(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))

    return linen(body), IMAGE


@network
def unet():
    def body(x):
        a = nn.relu(nn.Conv(4, (3, 3))(x))
        b = nn.relu(nn.Conv(8, (3, 3))(nn.avg_pool(a, (2, 2), (2, 2))))
        up = jax.image.resize(b, (b.shape[0], 8, 8, b.shape[-1]), "nearest")
        return nn.Conv(2, (1, 1))(nn.relu(nn.Conv(6, (3, 3))(jnp.concatenate([a, up], -1))))

    return linen(body), IMAGE


@network
def glu_and_split():
    def body(x):
        a, b = jnp.split(nn.Dense(24)(x), 2, -1)
        c = nn.Dense(10)(a * nn.sigmoid(b))
        return nn.Dense(3)(c[..., :4] + c[..., 4:8]) + nn.Dense(3)(c[..., 8:])

    return linen(body), SEQUENCE


@network
def channel_shuffle():
    def body(x):
        x = nn.relu(nn.Conv(12, (1, 1))(x))
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, 3, c // 3).swapaxes(3, 4).reshape(n, h, w, c)
        return nn.Dense(3)(nn.relu(nn.Conv(8, (1, 1))(x)).mean((1, 2)))

    return linen(body), IMAGE


@network
def pixel_shuffle():
    def body(x):
        x = nn.Conv(12, (3, 3))(x)
        n, h, w, c = x.shape
        x = (
            x.reshape(n, h, w, 2, 2, c // 4)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(n, 2 * h, 2 * w, c // 4)
        )
        return nn.Conv(2, (3, 3))(nn.relu(x))

    return linen(body), IMAGE


@network
def transformer():
    def block(x):
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), deterministic=True)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))

    body = lambda x: nn.Dense(5)(nn.LayerNorm()(block(block(nn.Embed(30, 16)(x)))))
    return linen(body), TOKENS


@network
def exact_layer_norm():
    norm = lambda: nn.LayerNorm(use_fast_variance=False)
    body = lambda x: nn.Dense(3)(norm()(nn.Dense(8)(nn.relu(nn.Dense(12)(norm()(nn.Dense(8)(x)))))))
    return linen(body), SEQUENCE


@network
def rms_norm_and_tied_embedding():
    def body(x):
        embed = nn.Embed(30, 16)
        y = embed(x)
        y = y + nn.Dense(16)(nn.silu(nn.Dense(24)(nn.RMSNorm()(y))))
        return embed.attend(nn.RMSNorm()(y))

    return linen(body), TOKENS


@network
def mixer():
    def body(x):
        x = nn.Dense(16)(x)
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        x = x + jnp.swapaxes(nn.Dense(6)(nn.gelu(nn.Dense(12)(y))), 1, 2)
        return nn.Dense(3)((x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))).mean(1))

    return linen(body), SEQUENCE


@network
def lstm():
    return linen(lambda x: nn.Dense(3)(nn.RNN(nn.LSTMCell(12))(nn.Dense(8)(x))[:, -1])), SEQUENCE


@network
def shared_block():
    def body(x):
        block = nn.Dense(8)
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(nn.relu(block(nn.relu(block(x)))))

    return linen(body), normal(2, 5)


@network
def qkv_in_one():
    def fn(p, x):
        n, t, _ = x.shape
        qkv = (x @ p["qkv"] + p["bias"]).reshape(n, t, 3, 4, 6)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k), -1)
        return jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, t, 24) @ p["out"]

    return fn, {"qkv": jnp.ones((10, 72)), "bias": jnp.ones(72), "out": jnp.ones((24, 5))}, SEQUENCE


@network
def grouped_query_attention():
    def fn(p, x):
        n, t, _ = x.shape
        q = (x @ p["q"]).reshape(n, t, 2, 3, 4)
        k, v = ((x @ p[name]).reshape(n, t, 2, 4) for name in "kv")
        angle = jnp.arange(t)[:, None] * jnp.array([1.0, 0.1])
        turn = lambda z, a: jnp.concatenate(
            [
                z[..., :2] * jnp.cos(a) - z[..., 2:] * jnp.sin(a),
                z[..., 2:] * jnp.cos(a) + z[..., :2] * jnp.sin(a),
            ],
            -1,
        )
        q, k = turn(q, angle[None, :, None, None]), turn(k, angle[None, :, None])
        weights = jax.nn.softmax(jnp.einsum("nqgmd,nkgd->ngmqk", q, k), -1)
        return jnp.einsum("ngmqk,nkgd->nqgmd", weights, v).reshape(n, t, 24) @ p["o"]

    shapes = {"q": (10, 24), "k": (10, 8), "v": (10, 8), "o": (24, 5)}
    return fn, {k: jnp.ones(s) for k, s in shapes.items()}, SEQUENCE


@network
def mixture_of_experts():
    def fn(p, x):
        gates = jax.nn.softmax(x @ p["gate"], -1)
        hidden = jax.nn.relu(jnp.einsum("nti,eih->nteh", x, p["up"]))
        return jnp.einsum("nteh,eho,nte->nto", hidden, p["down"], gates)

    return (
        fn,
        {"gate": jnp.ones((10, 3)), "up": jnp.ones((3, 10, 8)), "down": jnp.ones((3, 8, 4))},
        SEQUENCE,
    )


@network
def transposed_weights_and_unused():
    fn = lambda p, x: jax.nn.relu(x @ p["a"].T) @ p["b"].T + p["c"][::-1]
    return (
        fn,
        {
            "a": jnp.ones((8, 5)),
            "b": jnp.ones((3, 8)),
            "c": jnp.ones(3),
            "unused": jnp.ones((4, 4)),
        },
        normal(2, 5),
    )


@network
def several_outputs():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        return {"features": h, "logits": jax.nn.relu(h @ p["b"]) @ p["c"]}

    return fn, {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 8)), "c": jnp.ones((8, 3))}, normal(2, 5)


@network
def softmax_over_features():
    fn = lambda p, x: jax.nn.softmax(x @ p["a"], -1) @ p["b"]
    return fn, {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 3))}, normal(2, 5)


@network
def cumulative_and_sorted():
    fn = lambda p, x: jnp.sort(jnp.cumsum(x @ p["a"], -1) @ p["b"], -1) @ p["c"]
    return fn, {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 7)), "c": jnp.ones((7, 3))}, normal(2, 5)


@network
def bfloat16_mlp():
    fn = lambda p, x: jax.nn.relu(x.astype(jnp.bfloat16) @ p["a"]) @ p["b"]
    return (
        fn,
        {"a": jnp.ones((5, 16), jnp.bfloat16), "b": jnp.ones((16, 3), jnp.bfloat16)},
        normal(2, 5),
    )


@network
def rematerialised():
    def fn(p, x):
        block = jax.checkpoint(lambda w, y: jax.nn.relu(y @ w["a"]) @ w["b"])
        return block(p, block(p, x))

    return fn, {"a": jnp.ones((6, 8)), "b": jnp.ones((8, 6))}, normal(2, 6)


@network
def nnx_cnn():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.dense = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.dense(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    return (lambda p, x: nnx.merge(graphdef, p)(x)), state, IMAGE


@network
def control_flow_and_custom_gradients():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def fn(p, x):
        y = rounded(4 * (x @ p["a"]))
        y = jax.lax.cond(jnp.sum(y) > 0, lambda v: v @ p["b"], lambda v: -v @ p["b"], y)
        return jax.lax.fori_loop(0, 3, lambda _, v: jnp.tanh(v @ p["c"]), y)

    return fn, {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 7)), "c": jnp.ones((7, 7))}, normal(2, 5)


@network
def dropout_and_noise():
    def fn(p, x):
        h = jax.nn.relu(x @ p["a"])
        keep = jax.random.bernoulli(jax.random.key(0), 0.5, h[:1].shape)
        h = jax.nn.relu(jnp.where(keep, h, 0) @ p["b"])
        return h @ p["c"]

    return fn, {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 8)), "c": jnp.ones((8, 3))}, normal(2, 5)


@network
def weight_standardised():
    def fn(p, x):
        w = p["a"] - p["a"].mean(0, keepdims=True)
        w = w / jnp.sqrt(jnp.square(w).mean(0, keepdims=True) + 1e-3)
        return jax.nn.relu(x @ w) @ p["b"]

    return fn, {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 3))}, normal(2, 5)


@network
def constants_by_channel():
    scale = jnp.linspace(0.5, 2.0, 8)

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"]) * scale + jnp.arange(8.0) * 0.1
        return jax.nn.softplus(h) @ p["b"] + jnp.max(h[:, :0].sum() + p["c"] * 0)

    return fn, {"a": jnp.ones((5, 8)), "b": jnp.ones((8, 3)), "c": jnp.ones(4)}, normal(2, 5)


@network
def norm_over_a_constant_shift():
    """A feature that is zero when masked, but not after the shift: the norm must see it."""

    def fn(p, x):
        h = jnp.tanh(x @ p["a"]) + 1.0
        return (h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True))) @ p["b"]

    return fn, {"a": jnp.ones((5, 8)), "b": jnp.ones((8, 3))}, normal(2, 5)


@network
def windows_and_shifts():
    """Swin: windows of a rolled image, attention within them."""

    def fn(p, x):
        n, h, w, _ = x.shape
        y = jnp.roll(x @ p["in"], (1, 1), (1, 2))
        y = y.reshape(n, h // 4, 4, w // 4, 4, 12).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 12)
        q, k, v = (jnp.einsum("btc,chd->bthd", y, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2, -1)
        y = y + jnp.einsum("bhqk,bkhd,hdc->bqc", weights, v, p["o"])
        y = y.reshape(n, h // 4, w // 4, 4, 4, 12).transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, 12)
        return jnp.roll(y, (-1, -1), (1, 2)).mean((1, 2)) @ p["out"]

    shapes = {
        "in": (3, 12),
        "q": (12, 3, 4),
        "k": (12, 3, 4),
        "v": (12, 3, 4),
        "o": (3, 4, 12),
        "out": (12, 5),
    }
    return fn, {k: jnp.ones(s) for k, s in shapes.items()}, IMAGE


@network
def gru_and_simple_cell():
    def body(x):
        y = nn.RNN(nn.GRUCell(8))(nn.Dense(6)(x))
        return nn.Dense(3)(nn.RNN(nn.SimpleCell(10), reverse=True)(y))

    return linen(body), SEQUENCE


@network
def scanned_layers():
    def fn(p, x):
        def block(y, w):
            h = jax.nn.gelu((y - y.mean(-1, keepdims=True)) @ w["up"] + w["bias"])
            return y + h @ w["down"], y.mean()

        y, means = jax.lax.scan(block, x @ p["in"], p["layers"])
        return y @ p["out"] + means.sum()

    layers = {"up": jnp.ones((3, 6, 8)), "bias": jnp.ones((3, 8)), "down": jnp.ones((3, 8, 6))}
    return fn, {"in": jnp.ones((10, 6)), "layers": layers, "out": jnp.ones((6, 4))}, SEQUENCE


@network
def scanned_residual_stream():
    def fn(p, x):
        def block(y, w):
            return y + jax.nn.relu(y @ w["up"]) @ w["down"], None

        y = jax.lax.scan(jax.checkpoint(block), jax.nn.relu(x @ p["in"]), p["layers"])[0]
        return y @ p["out"]

    layers = {"up": jnp.ones((3, 6, 8)), "down": jnp.ones((3, 8, 6))}
    return fn, {"in": jnp.ones((10, 6)), "layers": layers, "out": jnp.ones((6, 4))}, SEQUENCE


@network
def carry_that_stops_being_zero():
    """Zero at the start and when masked in the first turn, but not after the shift of a turn."""

    def fn(p, x):
        turn = lambda c, v: (jnp.tanh(c + v @ p["a"]) + 0.5, jnp.sum(jnp.square(c), -1))
        c, sums = jax.lax.scan(turn, jnp.zeros((x.shape[1], 8)), x)
        return c @ p["b"], sums

    return fn, {"a": jnp.ones((10, 8)), "b": jnp.ones((8, 3))}, SEQUENCE


@network
def nested_scan_and_while():
    def fn(p, x):
        def outer(c, w):
            inner = lambda d, v: (jnp.tanh(d @ w["a"] + v[..., None]), None)
            return jax.lax.scan(inner, c, jnp.moveaxis(x, -1, 0))[0] @ w["b"], None

        y = jax.lax.scan(outer, x @ p["in"], p["layers"])[0]
        return jax.lax.fori_loop(0, 2, lambda _, v: v * 0.5, y @ p["out"])

    layers = {"a": jnp.ones((2, 6, 6)), "b": jnp.ones((2, 6, 6))}
    return fn, {"in": jnp.ones((10, 6)), "layers": layers, "out": jnp.ones((6, 4))}, SEQUENCE


@network
def stacked_tiled_and_sorted():
    def fn(p, x):
        h = jax.nn.relu(x @ p["a"])
        a, b = jnp.unstack(jnp.stack([h, 2 * h], 1), axis=1)
        h = jnp.cumsum(jnp.sort(a + b, axis=1), axis=1)
        h = jax.lax.dynamic_update_slice_in_dim(h, 0.5 * h[:, :2], jnp.int32(1), 1)
        h = jax.lax.dynamic_slice_in_dim(h, jnp.int32(1), 3, 1)
        return jnp.tile(h, (1, 2, 1)) @ p["b"] + jnp.repeat(h, 2, axis=1) @ p["b"]

    return fn, {"a": jnp.ones((10, 8)), "b": jnp.ones((8, 3))}, SEQUENCE


@network
def repeated_channels():
    fn = lambda p, x: (
        jnp.repeat(jax.nn.relu(x @ p["a"]), 2, axis=-1) @ p["b"]
        + jnp.tile(jnp.tanh(x @ p["c"]), (1, 2)) @ p["b"]
    )
    return fn, {"a": jnp.ones((5, 6)), "b": jnp.ones((12, 3)), "c": jnp.ones((5, 6))}, normal(2, 5)
