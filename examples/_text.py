"""The text of the language model: the reference of the Python language, or a book of yours."""

import re
from pathlib import Path

import numpy as np

OTHER = "\N{REPLACEMENT CHARACTER}"  # stands for rare characters
CHUNK = 2048  # characters that are held out, or not, together


def reference():
    """Some 420,000 characters of English prose and code that every Python carries for `help()`."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SystemExit(
            "no text: this Python has no pydoc_data (its `help()` texts); name a file of plain text "
            "with --text, some 300,000 characters or more"
        ) from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return re.sub(r"([*=~\"^-])\1{3,}", "", re.sub(r"[ \t]+", " ", text))


def load(file=None, characters=96):
    """Token ids of the text to train on and of what is held out (each tenth chunk), and characters.

    Args:
      file: plain text; by default Python's reference.
      characters: the most frequent so many are told apart.
    """
    text = reference() if file is None else Path(file).read_text(encoding="utf-8")
    if len(text) < 20_000:
        raise SystemExit(f"--text: {file} has {len(text)} characters, too few to learn from")
    found, counts = np.unique([*text], return_counts=True)
    known = sorted(found[np.argsort(-counts, kind="stable")][: characters - 1])
    number = {c: i + 1 for i, c in enumerate(known)}
    ids = np.array([number.get(c, 0) for c in text], np.int32)
    chunks = ids[: len(ids) // CHUNK * CHUNK].reshape(-1, CHUNK)
    is_held = np.arange(len(chunks)) % 10 == 9
    return chunks[~is_held].ravel(), chunks[is_held].ravel(), OTHER + "".join(known)


def batches(ids, count, *, size=16, length=128, seed=0):
    """`count` batches of random windows, each (size, length + 1)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(0, len(ids) - length - 1, size)
        yield ids[starts[:, None] + np.arange(length + 1)]


def windows(ids, *, count=64, length=128):
    """Windows spread over what is held out, each within a chunk: (count, length + 1)."""
    each = (CHUNK - 1) // length
    places = np.linspace(0, len(ids) // CHUNK * each - 1, count).astype(int)
    starts = places // each * CHUNK + places % each * length
    return ids[starts[:, None] + np.arange(length + 1)]
