"""The examples of sparse training run, and show what they say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture
def example(monkeypatch):
    """Loads an example by name, with the modules beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_rigl(example, tmp_path):
    found = example("rigl").main(steps=400, plot=tmp_path / "rigl.svg")
    assert found["dense"] > 0.9
    assert found["RigL"] > found["static"]
    assert "churn" in (tmp_path / "rigl.svg").read_text()


def test_sr_ste(example):
    right, most, first, last = example("sr_ste").main(steps=300)
    assert right > 0.9
    assert most == 2
    assert last < first


def test_group_lasso(example):
    right, parameters, flops, same = example("group_lasso").main(steps=300)
    assert same
    assert right > 0.9
    assert parameters < 0.7
    assert flops < 0.9


def test_lottery(example, tmp_path, capsys):
    tickets = example("lottery_tickets")
    right, lost, sparsity = tickets.main(tmp_path, steps=200, rounds=2)
    assert sparsity == pytest.approx(0.95, abs=1e-3)
    assert right > lost
    capsys.readouterr()
    again = tickets.main(
        tmp_path, steps=200, rounds=2
    )  # nothing left to train but the other weights
    assert again == (right, lost, sparsity)
    assert "round" not in capsys.readouterr().out


def test_state_space(example):
    found = example("sparse_state_space").main(steps=250)
    assert found["dense"][0] > 0.85
    assert found["RigL"][0] > 0.8
    assert found["RigL"][1] == pytest.approx(0.9, abs=5e-3)
