"""Layers of fixed connectivity beside the dense layer: time of products and gradients, size of the state.

    python benchmarks/layers.py [--width 1024 2048] [--rows 256]

Block-diagonal and butterfly kernels do less work, so they should be faster. Random and N:M kernels are
made dense before each product: they save memory of parameters, gradients and optimizer, never time, and
while a product runs its kernel is there in full. Sizes are counted from the shapes, not measured.
"""

import argparse

import jax
import jax.numpy as jnp
from _timing import in_turns, show
from flax import nnx

import jaxprune as jp

KINDS = {
    "block_diagonal(8)": jp.sparse.block_diagonal(8),
    "block_diagonal(32)": jp.sparse.block_diagonal(32),
    "butterfly(16)": jp.sparse.butterfly(16),
    "RandomNM(2, 4)": jp.sparse.RandomNM(2, 4),
    "RandomEntries(0.9)": jp.sparse.RandomEntries(0.9),
}


def calls(width, rows):
    """Forward and forward-with-gradient of each layer, on the same rows."""
    x = jax.random.normal(jax.random.key(0), (rows, width))
    layers = {"dense": nnx.Linear(width, width, rngs=nnx.Rngs(0))}
    for name, connectivity in KINDS.items():
        layers[name] = jp.nnx.SparseDense(width, width, connectivity, rngs=nnx.Rngs(0))
    forward, step, memory = {}, {}, {}
    for name, layer in layers.items():
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        run = lambda p, rest, x, graph=graph: nnx.merge(graph, p, rest)(x)
        loss = lambda p, rest, x, run=run: jnp.mean(jnp.square(run(p, rest, x)))
        go, grad = jax.jit(run), jax.jit(jax.grad(loss, (0, 2)))
        forward[name] = lambda go=go, p=params, r=rest: go(p, r, x)
        step[name] = lambda grad=grad, p=params, r=rest: grad(p, r, x)
        size = lambda tree: sum(v.nbytes for v in jax.tree.leaves(tree))
        # of Adam: the parameters, their gradients, two moments; the index is there once
        memory[name] = 4 * size(params) + size(rest)
    return forward, step, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_args()
    for width in arguments.width:
        forward, step, memory = calls(width, arguments.rows)
        title = f"{arguments.rows} rows, width {width}"
        show(f"{title}: product", in_turns(forward), "dense")
        show(f"{title}: product and gradients", in_turns(step), "dense")
        for name, size in memory.items():
            print(
                f"{name}: {size / memory['dense']:.3f} of the state of dense training with Adam (counted)"
            )


if __name__ == "__main__":
    main()
