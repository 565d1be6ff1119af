"""Folders that are whole or not there: written under a temporary name, renamed, sealed, and checked.

A folder has a `manifest.json` with the size and checksum of every other file, and a checksum of its own.
"""

import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
CHECKPOINT, MODEL = "jaxprune", "jaxprune-model"
_KINDS = {
    CHECKPOINT: (
        "checkpoint",
        "Orbax checkpoints of other programs are read with orbax.checkpoint, "
        "and saved here with jp.export.save",
    ),
    MODEL: ("model", "jp.export.save_model writes one"),
}
_READERS = {CHECKPOINT: "jp.export.load", MODEL: "jp.export.load_model"}
_SEAL = re.compile(r',"checksum":"([0-9a-f]{8})"}\Z')
_CHUNK = 1 << 22
_ATTEMPTS = 100


class Refused(ValueError):
    """An error of a reader that says all there is to say."""


def destination(path: str | Path, *, overwrite: bool) -> Path:
    """The absolute path of a folder to write; an error where something is there.

    Raises:
      FileExistsError: the path exists and `overwrite` is not set.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; choose another, or pass overwrite=True")
    return path


@contextmanager
def written(path: Path) -> Generator[Path]:
    """A folder to write into, which takes the place of `path` at the end; nothing stays on errors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield work
        os.chmod(work, 0o755)
        _replace(work, path)
    except BaseException:
        _discard(work)
        raise


def seal(work: Path, content: dict[str, Any]) -> None:
    """Writes the manifest: `content`, and the fingerprints of all files that are there."""
    found = {str(f.relative_to(work)): fingerprint(f) for f in files(work)}
    text = json.dumps({**content, "files": found}, separators=(",", ":"))
    (work / MANIFEST).write_text(_sealed(text))


def check_files(folder: Path, files: dict[str, Any]) -> None:
    for name, (size, checksum) in files.items():
        file = folder / name
        if not file.is_file():
            raise Refused(f"path: {folder} is incomplete: {name} is missing; copy or save it again")
        if file.stat().st_size != size or fingerprint(file)[1] != checksum:
            raise Refused(
                f"path: {folder} is damaged: {name} has {file.stat().st_size} bytes of {size}, or "
                "other content; copy or save it again"
            )


def manifest(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The manifest of a folder of one kind, `CHECKPOINT` or `MODEL`.

    Raises:
      Refused: a folder of another origin, kind or version, or a damaged manifest.
    """
    file = path / MANIFEST
    name, cure = _KINDS[kind]
    if not file.is_file():
        raise Refused(f"path: {path} is no jaxprune {name} (it has no {MANIFEST}); {cure}")
    text = file.read_bytes().decode("utf-8", "replace")
    found = _SEAL.search(text)
    is_whole = found is not None and _checksum(text[: found.start()]) == found[1]
    try:
        content = json.loads(text)
        known, got = content["format"], content.get("version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"path: {file} is damaged; copy or save it again") from error
    if known != kind:
        reader = _READERS.get(known if isinstance(known, str) else "")
        hint = f"; read it with {reader}" if reader else ""
        raise Refused(f"path: {path} is no jaxprune {name}: format {known!r}{hint}")
    if got != version and (is_whole or type(got) is int):
        raise Refused(
            f"path: {path} was written by another version of jaxprune ({got!r}, expected {version})"
        )
    if not is_whole:
        raise Refused(f"path: {file} is damaged (its checksum differs); copy or save it again")
    return content


def _sealed(text: str) -> str:
    """A JSON object with a checksum of itself at its end."""
    body = text.removesuffix("}")
    return f'{body},"checksum":"{_checksum(body)}"}}'


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def fingerprint(file: Path) -> tuple[int, int]:
    size = checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def _replace(work: Path, path: Path) -> None:
    """Renames `work` to `path`; what was there goes only after the new folder is in place."""
    if not path.exists():
        work.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / path.name)
    try:
        work.rename(path)
    except OSError:
        (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Removes a folder into which threads of a failed save may still be writing."""
    for _ in range(_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return
