"""Quantizing 8 x 2048 x 2048 weights, beside plain passes over the same data and qwix.

python benchmarks/quantize.py      # qwix is compared where it is installed (Python 3.12)
"""

import resource

import jax
import jax.numpy as jnp
from _timing import in_turns, show

import jaxprune as jp

LEAVES, WIDTH = 8, 2048


def with_qwix(params):
    """qwix's own quantizer on the same weights: int8, one scale per output channel."""
    try:
        from qwix._src.core import qarray
    except ImportError:
        return None
    how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(1,), calibration_method="absmax")
    quantize = jax.jit(lambda w: qarray.quantize(w, how))
    return lambda: [quantize(w) for w in params.values()]


def peak_memory():
    """Bytes above input and output at the highest point, in leaves of the input."""
    leaf = 4 * WIDTH * WIDTH
    most = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on Linux
    make = jax.jit(lambda key: jax.random.normal(key, (WIDTH, WIDTH)))
    params = {str(i): make(k) for i, k in enumerate(jax.random.split(jax.random.key(0), LEAVES))}
    jax.block_until_ready(jp.quantize_tree({"one": params["0"]}))  # compiled, its memory counted
    before = most()
    tree = jax.block_until_ready(jp.quantize_tree(params))
    extra = most() - before - (jp.nbytes(tree) - leaf // 4)
    print(f"int8: peak memory above input, output, one leaf: {max(extra, 0) / leaf:.2f} leaves")


def main():
    peak_memory()
    keys = jax.random.split(jax.random.key(0), LEAVES)
    params = {str(i): jax.random.normal(k, (WIDTH, WIDTH)) for i, k in enumerate(keys)}
    cast = jax.jit(lambda w: (w * 30.0).astype(jnp.int8))
    double = jax.jit(lambda w: w * 2.0)
    calls = {
        "read float32, write int8": lambda: [cast(w) for w in params.values()],
        "read and write float32": lambda: [double(w) for w in params.values()],
        "int8": lambda: jp.quantize_tree(params),
        "int8, asymmetric": lambda: jp.quantize_tree(params, symmetric=False),
        "int4": lambda: jp.quantize_tree(params, bits=4),
        "int4, groups of 128": lambda: jp.quantize_tree(params, bits=4, group_size=128),
        "int2": lambda: jp.quantize_tree(params, bits=2),
        "float8": lambda: jp.quantize_tree(params, dtype="float8_e4m3fn"),
        "nf4": lambda: jp.quantize_tree(params, dtype="nf4"),
    }
    qwix = with_qwix(params)
    if qwix is not None:
        calls["int8, qwix"] = qwix
    seconds = in_turns(calls, rounds=15)
    show(f"quantize {LEAVES} x {WIDTH}^2", seconds, "read and write float32")
    weights = LEAVES * WIDTH * WIDTH
    ours = 5 * weights / seconds["int8"]  # 4 bytes read and 1 written, in truth read twice
    one_pass = 8 * weights / seconds["read and write float32"]
    print(f"int8: {ours / one_pass:.2f} of the bandwidth of one read-and-write pass")


if __name__ == "__main__":
    main()
