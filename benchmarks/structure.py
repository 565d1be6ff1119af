"""ResNet-50: from the model to a compacted one, and what the compaction gains beside the FLOPs.

python benchmarks/structure.py [--size 128] [--batch 4]
"""

import argparse
import time

import jax
import jax.numpy as jnp
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
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for i, count in enumerate((3, 4, 6, 3)):
            for j in range(count):
                x = Block(64 * 2**i, 2 if i and not j else 1)(x)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    x = jax.random.normal(jax.random.key(1), (arguments.batch, arguments.size, arguments.size, 3))
    params = jax.jit(ResNet50().init)(jax.random.key(0), x)
    jax.block_until_ready(params)
    fn = ResNet50().apply
    for turn in ("first time in the process", "warm"):
        seconds, graph, masks, (small_fn, small) = pipeline(fn, params, x)
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        print(f"{turn}: {sum(seconds.values()):.2f} s ({parts}); {len(graph.groups)} groups")
    masked = jp.apply_masks(params, masks)
    dense, compacted = jax.jit(fn), jax.jit(small_fn)
    gap = jnp.max(jnp.abs(dense(masked, x) - compacted(small, x)))
    print(f"largest difference of removed and masked: {gap:.1e}")
    found = in_turns({"dense": lambda: dense(params, x), "compacted": lambda: compacted(small, x)})
    show(f"ResNet-50 at half the channels, {arguments.batch} x {arguments.size}^2", found, "dense")
    flops = graph.cost().flops / jp.trace(small_fn, small, x).cost().flops
    gained = found["dense"] / found["compacted"]
    print(
        f"{flops:.2f}x fewer FLOPs, {gained:.2f}x faster: {gained / flops:.2f} of the FLOPs ratio"
    )


if __name__ == "__main__":
    main()
