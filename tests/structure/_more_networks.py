"""More networks for the zoo, most of them in raw JAX: (function, shapes of parameters, inputs)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.structure._zoo import IMAGE, SEQUENCE, TOKENS, linen, network, normal


def shapes(**kw):
    """Parameters of ones from shapes; nested dicts are kept."""
    return {
        k: shapes(**v) if isinstance(v, dict) else jnp.ones(v if isinstance(v, tuple) else (v,))
        for k, v in kw.items()
    }


def conv(x, w, stride=1, groups=1, padding="SAME", layout=("NHWC", "HWIO", "NHWC"), **kw):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride,) * (w.ndim - 2),
        padding,
        dimension_numbers=layout,
        feature_group_count=groups,
        **kw,
    )


def norm(x, scale, bias, axis=-1):
    mean = x.mean(axis, keepdims=True)
    var = jnp.square(x).mean(axis, keepdims=True) - jnp.square(mean)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def attend(q, k, v, bias=0.0):
    """(batch, time, heads, dims), heads first in the scores."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + bias, -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@network
def inverted_residual():
    def fn(p, x):
        y = conv(x, p["stem"])
        for name in ("a", "b"):
            w = p[name]
            z = jax.nn.relu6(conv(y, w["expand"]) + w["bias"])
            z = jax.nn.relu6(conv(z, w["depth"], groups=16) * w["scale"])
            y = y + conv(z, w["project"])
        return y.mean((1, 2)) @ p["out"]

    block = {
        "expand": (1, 1, 6, 16),
        "bias": 16,
        "depth": (3, 3, 1, 16),
        "scale": 16,
        "project": (1, 1, 16, 6),
    }
    return fn, shapes(stem=(3, 3, 3, 6), a=block, b=block, out=(6, 3)), IMAGE


@network
def shufflenet_unit():
    def fn(p, x):
        y = jax.nn.relu(conv(x, p["stem"]))
        for name in ("a", "b"):
            left, right = jnp.split(y, 2, -1)
            right = jax.nn.relu(conv(right, p[name]["one"]))
            right = conv(right, p[name]["depth"], groups=4)
            right = jax.nn.relu(conv(right, p[name]["two"]))
            y = jnp.concatenate([left, right], -1)
            n, h, w, c = y.shape
            y = y.reshape(n, h, w, 2, c // 2).swapaxes(-1, -2).reshape(n, h, w, c)
        return y.mean((1, 2)) @ p["out"]

    block = {"one": (1, 1, 4, 4), "depth": (3, 3, 1, 4), "two": (1, 1, 4, 4)}
    return fn, shapes(stem=(3, 3, 3, 8), a=block, b=block, out=(8, 3)), IMAGE


@network
def resnext_grouped():
    def fn(p, x):
        y = jax.nn.relu(conv(x, p["a"]))
        y = jax.nn.relu(conv(y, p["b"], groups=4) + p["bias"])
        return conv(y, p["c"]).mean((1, 2))

    p = shapes(a=(1, 1, 3, 16), b=(3, 3, 4, 8), bias=8, c=(1, 1, 8, 3))
    return fn, p, IMAGE


@network
def channels_first():
    layout = ("NCHW", "OIHW", "NCHW")

    def fn(p, x):
        y = jnp.transpose(x, (0, 3, 1, 2))
        y = jax.nn.relu(conv(y, p["a"], layout=layout) + p["bias"][:, None, None])
        y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        y = jax.nn.relu(conv(y, p["b"], stride=2, layout=layout))
        return y.reshape(y.shape[0], -1) @ p["c"]

    p = shapes(a=(6, 3, 3, 3), bias=6, b=(8, 6, 3, 3), c=(8 * 4, 3))
    return fn, p, IMAGE


@network
def convnext_block():
    def fn(p, x):
        y = conv(x, p["stem"], stride=2)
        z = conv(y, p["depth"], groups=8) + p["bias"]
        z = norm(z, p["scale"], p["shift"])
        z = jax.nn.gelu(z @ p["up"] + p["up_bias"]) @ p["down"]
        return (y + p["layer_scale"] * z).mean((1, 2)) @ p["out"]

    p = shapes(
        stem=(2, 2, 3, 8), depth=(5, 5, 1, 8), bias=8, scale=8, shift=8, up=(8, 24), up_bias=24
    )
    return fn, p | shapes(down=(24, 8), layer_scale=8, out=(8, 3)), IMAGE


@network
def unet_with_transposed_convolutions():
    def fn(p, x):
        a = jax.nn.relu(conv(x, p["a"]))
        b = jax.nn.relu(conv(a, p["b"], stride=2))
        c = jax.nn.relu(conv(b, p["c"], stride=2))
        up = lambda y, w: jax.lax.conv_transpose(y, w, (2, 2), "SAME")
        d = jnp.concatenate([up(c, p["d"]), b], -1)
        e = jnp.concatenate([up(jax.nn.relu(d), p["e"]), a], -1)
        return conv(e, p["out"])

    p = shapes(a=(3, 3, 3, 4), b=(3, 3, 4, 6), c=(3, 3, 6, 8), d=(2, 2, 8, 5), e=(2, 2, 11, 7))
    return fn, p | shapes(out=(1, 1, 11, 2)), IMAGE


@network
def feature_pyramid():
    def fn(p, x):
        a = jax.nn.relu(conv(x, p["a"]))
        b = jax.nn.relu(conv(a, p["b"], stride=2))
        top = conv(b, p["top"])
        n, h, w, c = top.shape
        up = jnp.broadcast_to(top[:, :, None, :, None], (n, h, 2, w, 2, c))
        side = conv(a, p["side"]) + up.reshape(n, 2 * h, 2 * w, c)
        return conv(side, p["head"]), conv(top, p["head"])

    p = shapes(a=(3, 3, 3, 6), b=(3, 3, 6, 8), top=(1, 1, 8, 5), side=(1, 1, 6, 5))
    return fn, p | shapes(head=(3, 3, 5, 2)), IMAGE


@network
def channel_and_spatial_attention():
    def fn(p, x):
        y = jax.nn.relu(conv(x, p["a"]))
        mlp = lambda v: jax.nn.relu(v @ p["down"]) @ p["up"]
        gate = jax.nn.sigmoid(mlp(y.mean((1, 2))) + mlp(y.max((1, 2))))
        y = y * gate[:, None, None]
        spatial = jax.nn.sigmoid(conv(y, p["to_one"]))
        return (y * spatial).mean((1, 2)) @ p["out"]

    p = shapes(a=(3, 3, 3, 8), down=(8, 4), up=(4, 8), to_one=(3, 3, 8, 1), out=(8, 3))
    return fn, p, IMAGE


@network
def maxout_and_bilinear():
    def fn(p, x):
        h = (x @ p["a"] + p["b"]).reshape(x.shape[0], 6, 3).max(-1)
        return jnp.einsum("bi,bj,ijo->bo", h, jnp.tanh(x @ p["c"]), p["bilinear"])

    return fn, shapes(a=(5, 18), b=18, c=(5, 4), bilinear=(6, 4, 3)), normal(2, 5)


@network
def temporal_convolution():
    def fn(p, x):
        y = x
        for name, dilation in (("a", 1), ("b", 2), ("c", 4)):
            padded = jnp.pad(y, ((0, 0), (2 * dilation, 0), (0, 0)))
            z = conv(
                padded,
                p[name],
                padding="VALID",
                layout=("NWC", "WIO", "NWC"),
                rhs_dilation=(dilation,),
            )
            y = jax.nn.relu(z) if y.shape != z.shape else y + jax.nn.relu(z)
        return y[:, -1] @ p["out"]

    return fn, shapes(a=(3, 10, 8), b=(3, 8, 8), c=(3, 8, 8), out=(8, 3)), SEQUENCE


@network
def vision_transformer():
    def fn(p, x):
        n = x.shape[0]
        y = conv(x, p["patch"], stride=4, padding="VALID").reshape(n, -1, 12)
        y = jnp.concatenate([jnp.broadcast_to(p["class"], (n, 1, 12)), y], 1) + p["position"]
        z = norm(y, p["scale"], p["shift"])
        qkv = (z @ p["qkv"] + p["qkv_bias"]).reshape(n, 5, 3, 3, 4)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        y = y + attend(q, k, v).reshape(n, 5, 12) @ p["proj"]
        y = y + jax.nn.gelu(norm(y, p["scale2"], p["shift2"]) @ p["up"]) @ p["down"]
        return y[:, 0] @ p["head"]

    p = shapes(patch=(4, 4, 3, 12), position=(5, 12), scale=12, shift=12, qkv=(12, 36), qkv_bias=36)
    more = shapes(proj=(12, 12), scale2=12, shift2=12, up=(12, 20), down=(20, 12), head=(12, 4))
    return fn, p | more | {"class": jnp.ones((1, 1, 12))}, IMAGE


@network
def post_norm_encoder():
    def fn(p, t):
        y = p["words"][t] + p["positions"][: t.shape[1]] + p["types"][jnp.zeros_like(t)]
        y = norm(y, **p["norm"])
        keep = jnp.where((t > 2)[:, None, None], 0.0, -1e9)
        keep = jnp.broadcast_to(keep, (t.shape[0], 2, t.shape[1], t.shape[1]))
        for w in (p["a"], p["b"]):
            split = lambda z: z.reshape(*z.shape[:2], 2, 6)
            q, k, v = (split(y @ w[n] + w[n + "b"]) for n in "qkv")
            z = attend(q, k, v, keep).reshape(*y.shape) @ w["o"] + w["ob"]
            y = norm(y + z, **w["norm"])
            y = norm(y + jax.nn.gelu(y @ w["up"] + w["upb"]) @ w["down"], **w["norm2"])
        return jnp.tanh(y[:, 0] @ p["pool"]) @ p["out"]

    n = {"scale": 12, "bias": 12}
    matrix = dict.fromkeys("qkvo", (12, 12)) | {k + "b": 12 for k in "qkvo"}
    layer = matrix | {"up": (12, 20), "upb": 20, "down": (20, 12), "norm": n, "norm2": n}
    p = shapes(words=(30, 12), positions=(8, 12), types=(2, 12), norm=n, a=layer, b=layer)
    return fn, p | shapes(pool=(12, 12), out=(12, 3)), TOKENS


@network
def encoder_and_decoder():
    def fn(p, x):
        memory = jnp.tanh(x @ p["encode"])
        y = jnp.cumsum(x @ p["decode"], 1)
        split = lambda z: z.reshape(*z.shape[:2], 2, 4)
        q = split(y @ p["q"])
        k, v = split(memory @ p["k"]), split(memory @ p["v"])
        distance = jnp.arange(6)[:, None] - jnp.arange(6)
        bias = jnp.moveaxis(p["relative"][jnp.clip(distance + 3, 0, 6)], -1, 0)
        bias = jnp.where(distance >= 0, bias, -1e9)
        return (y + attend(q, k, v, bias).reshape(*y.shape[:2], 8) @ p["o"]) @ p["out"]

    p = shapes(encode=(10, 7), decode=(10, 9), q=(9, 8), k=(7, 8), v=(7, 8), relative=(7, 2))
    return fn, p | shapes(o=(8, 9), out=(9, 3)), SEQUENCE


@network
def decoding_with_a_cache():
    def fn(p, x):
        cache = jnp.zeros((2, x.shape[0], 6, 2, 4))

        def step(cache, t):
            y = jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False) @ p["in"]
            q, k, v = ((y @ p[n]).reshape(-1, 2, 4) for n in "qkv")
            cache = jax.lax.dynamic_update_slice(
                cache, jnp.stack([k, v])[:, :, None], (0, 0, t, 0, 0)
            )
            scores = jnp.einsum("bhd,bkhd->bhk", q, cache[0])
            scores = jnp.where(jnp.arange(6) <= t, scores, -1e9)
            z = jnp.einsum("bhk,bkhd->bhd", jax.nn.softmax(scores, -1), cache[1])
            return cache, (y + z.reshape(-1, 8) @ p["o"]) @ p["out"]

        return jax.lax.scan(step, cache, jnp.arange(6))[1]

    p = shapes(q=(6, 8), k=(6, 8), v=(6, 8), o=(8, 6), out=(6, 3)) | {"in": jnp.ones((10, 6))}
    return fn, p, SEQUENCE


@network
def parallel_block_and_interleaved_rotary():
    def fn(p, x):
        y = x @ p["in"]
        z = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5) * p["scale"]
        split = lambda v: v.reshape(*v.shape[:2], 2, 4)
        angle = jnp.arange(6)[:, None, None] * jnp.array([1.0, 0.1])

        def turn(v):
            a, b = v[..., ::2], v[..., 1::2]
            pairs = [
                a * jnp.cos(angle) - b * jnp.sin(angle),
                b * jnp.cos(angle) + a * jnp.sin(angle),
            ]
            return jnp.stack(pairs, -1).reshape(v.shape)

        q, k, v = (split(z @ p[n]) for n in "qkv")
        heads = attend(turn(q), turn(k), v).reshape(*y.shape[:2], 8) @ p["o"]
        return (y + heads + jax.nn.silu(z @ p["gate"]) * (z @ p["up"]) @ p["down"]) @ p["out"]

    p = shapes(scale=9, q=(9, 8), k=(9, 8), v=(9, 8), o=(8, 9), gate=(9, 12), up=(9, 12))
    return fn, p | shapes(down=(12, 9), out=(9, 3)) | {"in": jnp.ones((10, 9))}, SEQUENCE


@network
def linear_attention():
    def fn(p, x):
        q, k, v = (jax.nn.elu((x @ p[n]).reshape(*x.shape[:2], 2, 4)) + 1 for n in "qkv")
        kv = jnp.cumsum(jnp.einsum("bthd,bthe->bthde", k, v), 1)
        z = jnp.einsum("bthd,bthde->bthe", q, kv)
        return z.reshape(*x.shape[:2], 8) @ p["o"]

    return fn, shapes(q=(10, 8), k=(10, 8), v=(10, 8), o=(8, 3)), SEQUENCE


@network
def state_space_model():
    def fn(p, x):
        u = jax.nn.silu(x @ p["in"])
        decay = jax.nn.sigmoid(u @ p["decay"])
        drive = u[..., None] * (x @ p["b"])[:, :, None]
        combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
        _, states = jax.lax.associative_scan(
            combine, (jnp.broadcast_to(decay[..., None], drive.shape), drive), axis=1
        )
        y = jnp.einsum("btcs,bts->btc", states, x @ p["c"]) + p["skip"] * u
        return (y * jax.nn.silu(x @ p["gate"])) @ p["out"]

    p = shapes(decay=(8, 8), b=(10, 4), c=(10, 4), skip=8, gate=(10, 8), out=(8, 3))
    return fn, p | {"in": jnp.ones((10, 8))}, SEQUENCE


@network
def latent_queries():
    def fn(p, x):
        queries = jnp.broadcast_to(p["latents"], (x.shape[0], *p["latents"].shape))
        weights = jax.nn.softmax(jnp.einsum("bld,btd->blt", queries @ p["q"], x @ p["k"]), -1)
        y = queries + jnp.einsum("blt,btd->bld", weights, x @ p["v"])
        return jnp.tanh(y @ p["mix"]).mean(1) @ p["out"]

    p = shapes(latents=(3, 8), q=(8, 5), k=(10, 5), v=(10, 8), mix=(8, 6), out=(6, 3))
    return fn, p, SEQUENCE


@network
def routed_experts():
    def fn(p, x):
        value, index = jax.lax.top_k(x @ p["gate"], 2)
        weights = jax.nn.softmax(value, -1)
        mask = jnp.einsum("btk,btke->bte", weights, jax.nn.one_hot(index, 4))
        hidden = jax.nn.relu(jnp.einsum("bti,eih->bteh", x, p["up"]) + p["bias"])
        return jnp.einsum("bteh,eho,bte->bto", hidden, p["down"], mask)

    p = shapes(gate=(10, 4), up=(4, 10, 8), bias=(4, 8), down=(4, 8, 3))
    return fn, p, SEQUENCE


@network
def experts_by_branch():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        which = (x.sum() > 0).astype(jnp.int32)
        branches = [
            lambda v: jax.nn.relu(v @ p["b"]) @ p["c"],
            lambda v: jnp.sin(v @ p["d"]) @ p["c"] + p["bias"],
        ]
        return jax.lax.switch(which, branches, h)

    return fn, shapes(a=(5, 6), b=(6, 8), c=(8, 3), d=(6, 8), bias=3), normal(2, 5)


@network
def bidirectional_lstm():
    def body(x):
        forward = nn.RNN(nn.LSTMCell(6))
        backward = nn.RNN(nn.GRUCell(5), reverse=True, keep_order=True)
        return nn.Dense(3)(nn.LayerNorm()(nn.Dense(8)(nn.Bidirectional(forward, backward)(x))))

    return linen(body), SEQUENCE


@network
def attention_over_a_recurrent_encoder():
    def fn(p, x):
        def cell(h, v):
            z = jax.nn.sigmoid(v @ p["z"] + h @ p["hz"])
            h = (1 - z) * h + z * jnp.tanh(v @ p["n"] + h @ p["hn"])
            return h, h

        start = jnp.zeros((x.shape[0], 8))
        last, states = jax.lax.scan(cell, start, jnp.swapaxes(x, 0, 1))
        weights = jax.nn.softmax(jnp.einsum("bd,tbd->bt", last @ p["query"], states), -1)
        context = jnp.einsum("bt,tbd->bd", weights, states)
        return jnp.concatenate([last, context], -1) @ p["out"]

    p = shapes(z=(10, 8), hz=(8, 8), n=(10, 8), hn=(8, 8), query=(8, 8), out=(16, 3))
    return fn, p, SEQUENCE


@network
def weights_made_by_weights():
    def fn(p, x):
        kernel = (p["code"] @ p["make"]).reshape(5, 8)
        h = jax.nn.relu(x @ kernel)
        scale, shift = jnp.split(jnp.tanh(x @ p["film"]) @ p["film2"], 2, -1)
        return (h * (1 + scale) + shift) @ p["out"]

    p = shapes(code=(4,), make=(4, 40), film=(5, 6), film2=(6, 16), out=(8, 3))
    return fn, p, normal(2, 5)


@network
def highway_and_prelu():
    def fn(p, x):
        h = x @ p["in"]
        gate = jax.nn.sigmoid(h @ p["gate"] + p["bias"])
        y = h @ p["lift"]
        h = gate * jnp.where(y > 0, y, p["slope"] * y) + (1 - gate) * h
        return jnp.clip(h, -1.0, 1.0) @ p["out"]

    p = shapes(gate=(8, 8), bias=8, lift=(8, 8), slope=8, out=(8, 3))
    return fn, p | {"in": jnp.ones((5, 8))}, normal(2, 5)


@network
def vector_quantiser():
    def fn(p, x):
        z = x @ p["encode"]
        far = jnp.square(z[..., None, :] - p["codes"]).sum(-1)
        nearest = p["codes"][jnp.argmin(far, -1)]
        z = z + jax.lax.stop_gradient(nearest - z)
        return jax.nn.relu(z @ p["decode"]) @ p["out"]

    return fn, shapes(encode=(10, 4), codes=(7, 4), decode=(4, 8), out=(8, 3)), SEQUENCE


@network
def graph_network():
    edges = jnp.array([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 5]])

    def fn(p, x):
        def one(x):
            h = jax.nn.relu(x @ p["in"])
            for name in "ab":
                sent = jax.nn.relu(h[edges[0]] @ p[name])
                h = h + jax.ops.segment_sum(sent, edges[1], 6)
            return h.max(0) @ p["out"]

        return jax.vmap(one)(x)

    return fn, shapes(a=(8, 8), b=(8, 8), out=(8, 3)) | {"in": jnp.ones((10, 8))}, SEQUENCE


@network
def coupling_flow():
    def fn(p, x):
        y = x
        for name in "ab":
            left, right = y[..., :4], y[..., 4:]
            net = jnp.tanh(left @ p[name]["one"]) @ p[name]["two"]
            scale, shift = net[..., :4], net[..., 4:]
            y = jnp.concatenate([right * jnp.exp(scale) + shift, left], -1)
        return y, scale.sum(-1)

    block = {"one": (4, 10), "two": (10, 8)}
    return fn, shapes(a=block, b=block), normal(2, 8)


@network
def equilibrium_by_while():
    def fn(p, x):
        drive = x @ p["in"]
        step = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"] + drive), s[1])
        go_on = lambda s: (s[0] < 5) & (jnp.abs(s[1] - s[2]).sum() > 1e-6)
        start = (0, jnp.tanh(drive), drive)
        return jax.lax.while_loop(go_on, step, start)[1] @ p["out"]

    return fn, shapes(w=(8, 8), out=(8, 3)) | {"in": jnp.ones((5, 8))}, normal(2, 5)


@network
def gradient_inside():
    def fn(p, x):
        energy = lambda v: jnp.sum(jnp.tanh(v @ p["a"]) @ p["b"])
        return x - 0.1 * jax.grad(energy)(x)

    return fn, shapes(a=(5, 8), b=(8, 3)), normal(2, 5)


@network
def one_inner_training_step():
    def fn(p, x):
        loss = lambda w: jnp.square(jnp.tanh(x @ w["a"]) @ w["b"] - 1).mean()
        w = jax.tree.map(lambda v, g: v - 0.1 * g, p, jax.grad(loss)(p))
        return jnp.tanh(x @ w["a"]) @ w["b"]

    return fn, shapes(a=(5, 8), b=(8, 3)), normal(2, 5)


@network
def ensemble_by_vmap():
    def fn(p, x):
        member = lambda w: jax.nn.relu(x @ w["a"] + w["b"]) @ w["c"]
        return jax.vmap(member)(p).mean(0)

    return fn, shapes(a=(4, 5, 8), b=(4, 8), c=(4, 8, 3)), normal(2, 5)


@network
def fourier_mixing():
    def fn(p, x):
        y = x @ p["in"]
        y = y + jnp.fft.fft(y, axis=1).real
        return jax.nn.gelu(y @ p["up"]) @ p["down"]

    return fn, shapes(up=(8, 12), down=(12, 3)) | {"in": jnp.ones((10, 8))}, SEQUENCE


@network
def dropout_with_a_key():
    def fn(p, x):
        h = jax.nn.relu(x @ p["a"])
        keep = jax.random.bernoulli(jax.random.key(3), 0.7, h.shape[1:])
        h = jnp.where(keep, h / 0.7, 0.0)
        noise = 0.1 * jax.random.normal(jax.random.key(4), p["b"].shape)
        return h @ (p["b"] + noise)

    return fn, shapes(a=(5, 8), b=(8, 3)), normal(2, 5)


@network
def straight_through_quantised():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(8 * x) / 8

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))

    def fn(p, x):
        h = rounded(jax.nn.relu(x @ rounded(p["a"])))
        return h @ rounded(p["b"])

    return fn, shapes(a=(5, 8), b=(8, 3)), normal(2, 5)


@network
def swin_block_with_relative_bias():
    def fn(p, x):
        n = x.shape[0]
        y = conv(x, p["patch"], stride=1)
        z = jnp.roll(norm(y, p["scale"], p["shift"]), (-2, -2), (1, 2))
        z = z.reshape(n, 2, 4, 2, 4, 12).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 12)
        q, k, v = jnp.split((z @ p["qkv"]).reshape(-1, 16, 3, 12), 3, axis=-1)
        place = jnp.arange(16) // 4
        bias = p["table"][(place[:, None] - place[None]) + 3].transpose(2, 0, 1)
        region = jnp.arange(16) % 4 < 2
        bias = bias + jnp.where(region[:, None] == region[None], 0.0, -100.0)
        z = attend(q, k, v, bias).reshape(-1, 16, 12) @ p["o"]
        z = z.reshape(n, 2, 2, 4, 4, 12).transpose(0, 1, 3, 2, 4, 5).reshape(n, 8, 8, 12)
        y = y + jnp.roll(z, (2, 2), (1, 2))
        merged = jnp.concatenate([y[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return (merged @ p["merge"]).mean((1, 2)) @ p["out"]

    p = shapes(patch=(2, 2, 3, 12), scale=12, shift=12, qkv=(12, 36), table=(7, 3), o=(12, 12))
    return fn, p | shapes(merge=(48, 10), out=(10, 3)), IMAGE


@network
def squeezed_and_repeated_axes():
    def fn(p, x):
        h = jnp.squeeze(jnp.expand_dims(x @ p["a"], 1), 1)
        h = jnp.where(jnp.isfinite(h), h, 0.0) ** 2
        h = jnp.flip(jnp.sort(h, 0), 0).T.T
        h = jnp.maximum(h, 0.0) - jnp.minimum(h, 0.0)
        return jnp.einsum("bi,io->bo", h, p["b"], precision="highest")

    return fn, shapes(a=(5, 8), b=(8, 3)), normal(2, 5)


@network
def nnx_transformer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(12, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
            self.norm2 = nnx.RMSNorm(12, rngs=rngs)
            self.up, self.down = nnx.Linear(12, 20, rngs=rngs), nnx.Linear(20, 12, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm(x))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(30, 12, rngs=rngs)
            self.first, self.second = Block(rngs), Block(rngs)

        def __call__(self, t):
            return self.embed.attend(self.second(self.first(self.embed(t))))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    return (lambda p, x: nnx.merge(graphdef, p)(x)), state, TOKENS
