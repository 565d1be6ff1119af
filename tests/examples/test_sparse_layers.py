"""The example of sparse layers, on a few made-up images."""

import importlib.util
from pathlib import Path

import numpy as np
from flax import nnx

FILE = Path(__file__).resolve().parents[2] / "examples" / "sparse_layers.py"


def test_sparse_layers_learn():
    spec = importlib.util.spec_from_file_location("sparse_layers", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 400).astype(np.int32)
    images = 0.3 * rng.random((400, 784)).astype(np.float32)
    images.reshape(400, 28, 28)[np.arange(400), labels * 2] += 1.0  # a bright row tells the class
    data, patterns = (images, labels), example.patterns()
    for name in ("butterfly", "random, ERK"):
        model = example.LinenMLP(patterns[name])
        variables = example.linen(model, data, 15)
        assert example.right(model.apply(variables, images), labels) > 0.9
        assert example.size(variables["params"]) < 0.35 * (784 * 512 + 512 * 512)
    module = example.by_nnx(patterns["random, ERK"], data, 15)
    assert example.right(module(images), labels) > 0.9
    assert example.size(nnx.state(module, nnx.Param)) == example.size(variables["params"])
