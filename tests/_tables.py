"""Tables of the docs that tests find: `JAXPRUNE_WRITE_DOCS=1 pytest` writes them anew."""

import os
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def row(doc, name, *cells):
    """Finds the row of a name in a table of `docs/`, or writes it."""
    file = DOCS / doc
    line = f"| {name} | {' | '.join(cells)} |"
    lines = file.read_text().splitlines()
    if os.environ.get("JAXPRUNE_WRITE_DOCS"):
        at = [i for i, old in enumerate(lines) if old.startswith(f"| {name} |")]
        assert at, f"{doc} needs a row that begins with '| {name} |'"
        lines[at[0]] = line
        file.write_text("\n".join(lines) + "\n")
    assert line in lines, f"{doc} says otherwise: {line}"
