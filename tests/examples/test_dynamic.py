"""The example of dynamic pruning, on a few made-up images."""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_dynamic_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("dynamic", EXAMPLES / "dynamic.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dynamic", example)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "BATCH", 32)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500).astype(np.int32)
    images = rng.random((500, 28, 28, 1)).astype(np.float32) * 0.5
    images[np.arange(500), labels * 2] += 0.5  # a bright row tells the class
    data = images, labels
    how = argparse.Namespace(epochs=1, dense_epochs=2, factors=[3.0])
    found, last = example.compare(how, data, data, range(1))
    assert set(found) == {"dense", "static", *example.METHODS}
    ((_, share),) = found["top-k"][3.0]
    assert 0.3 < share < 0.34
    module, params, seen = last["top-k", 3.0]
    whole = module.apply({"params": params}, images[:1])
    few = module.apply({"params": params}, images[:1], method="skip")
    np.testing.assert_allclose(few, whole, rtol=1e-3, atol=1e-4)
    module, params, _ = last["L1", 3.0]
    whole = module.apply({"params": params}, images[:1])
    few = module.apply({"params": params}, images[:1], method="bucketed")
    np.testing.assert_allclose(few, whole, rtol=1e-3, atol=1e-4)
    example.plot(tmp_path / "a.svg", found)
    assert "static" in (tmp_path / "a.svg").read_text()
    assert seen.examples == 500
