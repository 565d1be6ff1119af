"""The code of the README and of the docs runs."""

import re
import runpy
from pathlib import Path

import pytest

import jaxprune as jp

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page):
    """The page's Python blocks, each with the line that it starts at."""
    text = (ROOT / page).read_text()
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start(1)].count("\n"), found.group(1)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))])
def test_code_runs(page, tmp_path, monkeypatch):
    """Block after block, in the names that the prelude gives."""
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(Path(__file__).parent / "_prelude.py"))
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(ROOT / page), "exec"), names)


def test_names_in_prose_exist():
    """`jp.…` in the pages' text and code are names of the package."""
    for page in PAGES:
        for name in re.findall(r"\bjp((?:\.[a-zA-Z_]\w*)+)", (ROOT / page).read_text()):
            value = jp
            for part in name.strip(".").split("."):
                if not hasattr(value, part):
                    assert isinstance(value, type) or callable(value), f"{page}: jp{name}"
                    break
                value = getattr(value, part)
