"""The one place of progress bars."""

import time

import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune import _progress
from jaxprune._progress import stages, track


@pytest.mark.parametrize("switch", ["0", "1", None])
def test_items_pass_and_the_switch_is_heard(switch, monkeypatch, capsys):
    if switch is None:
        monkeypatch.delenv("JAXPRUNE_PROGRESS", raising=False)
    else:
        monkeypatch.setenv("JAXPRUNE_PROGRESS", switch)
        monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich can tell
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
    assert list(track(range(3), "count")) == [0, 1, 2]
    # a bar that so few items hardly fill may not be drawn, but it hides the cursor meanwhile
    assert ("\x1b[?25l" in capsys.readouterr().out) == (switch == "1")


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAXPRUNE_PROGRESS", "1")
    monkeypatch.setattr(_progress, "PATIENCE", 0.02)


def test_what_takes_long_says_its_stage(terminal, monkeypatch, capsys):
    with stages("compact") as stage:
        stage("tracing")
        time.sleep(0.3)
        stage("cutting 3 leaves")
        time.sleep(0.3)
    shown = capsys.readouterr().out
    assert "compact: tracing" in shown
    assert "compact: cutting 3 leaves" in shown
    assert shown.rstrip().endswith("\x1b[?25h") or "\x1b[2K" in shown  # and leaves nothing behind
    monkeypatch.setattr(_progress, "PATIENCE", 60.0)
    with stages("compact") as stage:
        stage("tracing")
    monkeypatch.setenv("JAXPRUNE_PROGRESS", "0")
    monkeypatch.setattr(_progress, "PATIENCE", 0.01)
    with stages("compact"):
        time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_errors_end_it(terminal):
    with pytest.raises(ValueError, match="expected a tree"):
        jp.report(None, {"a": jnp.ones(3)}, {"b": jnp.ones(3)})

    def failing():
        with stages("compact"):
            time.sleep(0.1)
            raise KeyError("inside")

    with pytest.raises(KeyError):
        failing()


def test_functions_say_what_they_do(terminal, monkeypatch):
    said = []
    monkeypatch.setattr(_progress.Stages, "__call__", lambda self, text: said.append(text))
    params, x = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}, jnp.ones((1, 4))
    fn = lambda p, x: (x @ p["a"]) @ p["b"]
    keep = jnp.arange(8) < 6
    jp.compact(fn, params, {"a": keep[None], "b": keep[:, None]}, x, verify=True)
    jp.compressed(fn)(jp.quantize_tree(params), x)
    jp.report(fn, params, params, x)
    text = "\n".join(said)
    for stage in ("tracing", "cutting 2 leaves", "comparing", "2 operations on 2", "timing"):
        assert stage in text
