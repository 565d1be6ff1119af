"""What a language model does once it is small: codes, generation with a cache, speed, a served folder."""

import subprocess
import sys
import time

import _decoder
import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp

STATES = {"cache": lambda out: out[1]}
BLOCK = "blocks/[0-9]+/"


def whole(graph):
    """Groups that stay: features of a head, and queries that share a key."""
    inside = lambda name: "(inner)" in name or "/value/" in name or "/query/" in name
    return [group.name for group in graph.groups if inside(group.name)]


# --- quantize, generate


def quantized(fn, params, bits):
    """Codes in groups of 32 along what products sum over; norms and biases stay."""
    x = jnp.zeros((1, 8), jnp.int32)
    uses = jp.uses(fn, params, x)
    return jp.quantize_tree(params, bits=bits, group_size=32 if bits == 4 else None, uses=uses)


def next_token(fn):
    """`(params, token, cache, position) -> (next token, logits, cache)`, greedily."""

    def step(params, token, cache, position):
        logits, cache = fn(params, token, cache, position)
        return jnp.argmax(logits[:, -1:], -1).astype(jnp.int32), logits[:, -1], cache

    return step


def generated(step, params, cache, prompt, length):
    """Token ids after a prompt, (length,), and their logits, token by token through the cache."""
    token, tokens, logits = prompt[:1, None], [], []
    for i in range(len(prompt) + length - 1):
        token, found, cache = step(params, token, cache, jnp.int32(i))
        if i + 1 < len(prompt):
            token = prompt[i + 1 : i + 2, None]
            continue
        tokens.append(int(token[0, 0]))
        logits.append(found[0])
    return tokens, jnp.stack(logits)


def expanded(small_fn, small, params):
    """Small parameters at their places among zeros: what the masked network holds."""
    kept, leaves = small_fn.sizes()["kept"], []
    for x, full, indices in zip(jax.tree.leaves(small), jax.tree.leaves(params), kept, strict=True):
        places = [
            np.arange(n) if i is None else i for n, i in zip(full.shape, indices, strict=True)
        ]
        leaves.append(np.zeros(full.shape, full.dtype))
        leaves[-1][np.ix_(*places)] = x
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def tokens_per_second(calls, rounds=100):
    """Median speed of single steps, measured in turns."""
    taken = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (step, *inputs) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*inputs))
            taken[name].append(time.perf_counter() - start)
    return {name: 1 / float(np.median(x[1:])) for name, x in taken.items()}


def speeds(fn, params, masks, c, scan, length=256):
    """Tokens per second at batch 1 and bytes of parameters and cache: dense, cut, in 8 and 4 bits."""
    token, position = jnp.zeros((1, 1), jnp.int32), jnp.int32(length // 2)
    cache = _decoder.empty_cache(c, 1, length, scan=scan)
    example = (token, cache, position)
    small_fn, small = jp.compact(fn, params, masks, *example, states=STATES)
    short = small_fn.small_state("cache", cache)
    run = jax.jit(next_token(jp.compressed(small_fn)))
    calls = {"dense": (jax.jit(next_token(fn)), params, *example)}
    calls["cut"] = (jax.jit(next_token(small_fn)), small, token, short, position)
    plain = small_fn.of(fn)
    for b in (8, 4):
        calls[f"cut, {b} bits"] = (run, quantized(plain, small, b), token, short, position)
    rates = tokens_per_second(calls)
    return {
        name: (rates[name], jp.nbytes(tree), jp.nbytes(own))
        for name, (_, tree, _, own, _) in calls.items()
    }


def larger(scan):
    """The same network at a size whose weights do not fit a cache, never trained, cut by magnitude."""
    c = _decoder.Config(layers=8, width=512, heads=8, kv_heads=4, head_dim=64, neurons=1536)
    fn, params = (_decoder.scanned if scan else _decoder.unscanned)(c)
    graph, scores = jp.trace(fn, params, jnp.zeros((1, 8), jnp.int32)), jp.scores.magnitude(params)
    layers = jp.structure.layer_masks(graph, scores, count=2, pattern=None if scan else BLOCK)
    units = jp.structure.unit_masks(
        graph, scores, sparsity=1 / 4, scope="leaf", round_to=64, ignore=whole(graph)
    )
    return c, fn, params, jax.tree.map(jnp.logical_and, layers, units)


# --- serve

SERVER = """
import sys
import numpy as np
import jaxprune as jp

model = jp.export.load_model(sys.argv[1] + "/model")
cache = jp.export.load(sys.argv[1] + "/cache")
prompt = [int(x) for x in sys.argv[2].split()]
token, tokens = np.int32([[prompt[0]]]), []
for i in range(len(prompt) + int(sys.argv[3]) - 1):
    token, logits, cache = model(token, cache, position=i)
    if i + 1 < len(prompt):
        token = np.int32([[prompt[i + 1]]])
    else:
        tokens.append(int(token[0, 0]))
assert "flax" not in sys.modules and "_decoder" not in sys.modules
print(*tokens)
"""


def served(folder, step, tree, cache, prompt, length):
    """Token ids that a fresh process makes from a folder, which knows nothing of this file."""
    example = (jnp.zeros((1, 1), jnp.int32), cache, jnp.int32(0))
    jp.export.save_model(folder / "model", step, tree, *example)
    jp.export.save(folder / "cache", cache)
    ids = " ".join(map(str, prompt.tolist()))
    run = [sys.executable, "-c", SERVER, str(folder), ids, str(length)]
    out = subprocess.run(run, check=True, capture_output=True, text=True, cwd=folder)
    return [int(x) for x in out.stdout.split()]
