"""The picture of sparse training shows what metrics hold, and says what it cannot show."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp


def history(steps):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8)), "v": jnp.ones((8, 4))}
    tx = jp.optim.rigl(optax.sgd(0.1), 0.5, key=jax.random.key(1), every=3)
    state = tx.init(params)
    first = jp.optim.get_masks(state)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        found = jp.optim.metrics(state, since=first, per_leaf=True)
        return (optax.apply_updates(params, updates), state), found | {"loss": params["w"].sum()}

    _, seen = jax.lax.scan(step, (params, state), None, length=steps)
    return [{name: values[i] for name, values in seen.items()} for i in range(steps)]


def test_every_panel_is_there(tmp_path):
    file = jp.reports.plot_training(tmp_path / "a.svg", history(9), title="RigL & others")
    text = file.read_text()
    for word in ("loss", "overlap", "churn", "regrown", "dead units", "sparsity of leaves", "RigL"):
        assert word in text, word


def test_what_is_missing_is_left_out(tmp_path):
    points = [{"masks/sparsity": 0.0}, {"loss": 1.0, "masks/sparsity": 0.5}]
    text = jp.reports.plot_training(tmp_path / "b.svg", points, steps=[0, 100]).read_text()
    assert "fraction of the weights" in text
    assert "dead units" not in text


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        jp.reports.plot_training(tmp_path / "c.svg", [])
    with pytest.raises(ValueError, match="steps: 1"):
        jp.reports.plot_training(tmp_path / "c.svg", [{"loss": 1.0}] * 2, steps=[0])
    with pytest.raises(ValueError, match="'loss' has shape"):
        jp.reports.plot_training(tmp_path / "c.svg", [{"loss": jnp.ones(3)}])
