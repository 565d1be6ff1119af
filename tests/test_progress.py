"""The one place of progress bars."""

import pytest

from jaxprune._progress import track


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
