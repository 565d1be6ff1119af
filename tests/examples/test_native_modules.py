"""The example rebuilds native modules that equal the masked originals."""

import importlib.util
from pathlib import Path

import jax
import numpy as np

FILE = Path(__file__).resolve().parents[2] / "examples" / "native_modules.py"


def test_native_modules():
    spec = importlib.util.spec_from_file_location("native_modules", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    native, small, expected = example.linen(x)
    assert native.widths[0] < 32  # an equal share of each group
    assert native.widths[1] < 64
    fresh = native.init(jax.random.key(0), x)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, small)
    np.testing.assert_allclose(native.apply(small, x), expected, atol=1e-5)
    module, expected = example.by_nnx(x)
    assert module.conv1.kernel.shape[-1] == module.conv1.out_features < 32
    np.testing.assert_allclose(module(x), expected, atol=1e-5)
