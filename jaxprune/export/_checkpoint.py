"""Trees to folders and back, through Orbax.

A checkpoint is a folder with `arrays/` (an Orbax checkpoint; masks at one bit per entry), or `arrays.bin`
(entropy-coded), and `manifest.json`: the tree's structure, and the size and checksum of every file. It
is written under a temporary name and renamed, so a folder of the final name is always whole.
"""

import json
import os
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._types import PyTree
from jaxprune.export._entropy import coded, decoded
from jaxprune.export._structure import decode, encode

_MANIFEST, _CODED = "manifest.json", "arrays.bin"
_FORMAT, _VERSION = "jaxprune", 1
_CHUNK = 1 << 22
_ATTEMPTS = 100


def save(path: str | Path, tree: PyTree, *, overwrite: bool = False, entropy: bool = False) -> Path:
    """Writes a tree to a folder. Inverse of `load`.

    Args:
      path: the folder to make; its parents are made as needed.
      tree: arrays, masks, compressed leaves, numbers and strings in dicts, lists, tuples, named
        tuples (optimizer states), `FrozenDict` or `nnx.State`.
      overwrite: replace what is there; else an existing path is an error.
      entropy: code arrays by the frequencies of their bytes, as Deep Compression does, which makes
        clustered and pruned weights smaller still; slower (some 10 MB/s), and in memory, not through
        Orbax.

    Returns:
      The path. Equal arrays are stored once.

    Raises:
      FileExistsError: the path exists and `overwrite` is not set.
      TypeError: a node that cannot be loaded back without its class, such as a module; nothing is
        written.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp() + "/model"
      >>> _ = jp.export.save(folder, jp.quantize_tree({"w": jnp.ones((8, 8))}, bits=4))
      >>> jp.export.load(folder)["w"].shape
      (8, 8)
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; choose another, or pass overwrite=True")
    structure, arrays = encode(tree, symbols=entropy)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    coding: dict[str, Any] = {}
    try:
        stored = stored_arrays(arrays)
        if entropy:
            coding = _write_coded(work / _CODED, stored)
        elif stored:
            import orbax.checkpoint as ocp  # slow to import: when files are written

            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(work / "arrays", stored)
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "tree": structure,
            "arrays": [
                {"dtype": str(a.dtype), "shape": list(np.shape(a)), **coding.get(str(i), {})}
                for i, a in enumerate(arrays)
            ],
            "files": {str(f.relative_to(work)): _fingerprint(f) for f in _files(work)},
        }
        (work / _MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")))
        os.chmod(work, 0o755)
        _replace(work, path)
    except BaseException:
        _discard(work)
        raise
    return path


def _write_coded(file: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Writes arrays one after the other; how each is coded, and its bytes."""
    coding = {}
    with file.open("wb") as stream:
        for name, array in stored.items():
            host = np.asarray(array)
            method, data = coded(host)
            stream.write(data)
            coding[name] = {"coding": method, "bytes": len(data)}
    return coding


def _read_coded(file: Path, entries: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    found = {}
    with file.open("rb") as stream:
        for i, entry in enumerate(entries):
            if "coding" not in entry:
                continue
            dtype, shape = _stored_form(entry["dtype"], tuple(entry["shape"]))
            found[str(i)] = decoded(entry["coding"], stream.read(entry["bytes"]), dtype, shape)
    return found


def _stored_form(dtype: str, shape: tuple[int, ...]) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and shape of what `_stored` makes."""
    if dtype == "bool":
        return np.dtype(np.uint8), (-(-int(np.prod(shape)) // 8),)
    wanted = jnp.dtype(dtype)
    return (np.dtype(np.uint8) if _by_bytes(wanted) else wanted), shape or (1,)


def _discard(folder: Path) -> None:
    """Removes a folder into which threads of a failed save may still be writing."""
    for _ in range(_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


def stored_arrays(arrays: list[Any]) -> dict[str, Any]:
    """Arrays as files hold them, by number; empty ones have no place there: their shape says all."""
    return {str(i): _stored(array) for i, array in enumerate(arrays) if np.size(array)}


def _stored(array: Any) -> Any:
    """The array as Orbax keeps it: bools as bits, scalars with an axis, small floats as bytes."""
    array = jnp.asarray(array) if np.ndim(array) == 0 else array
    if array.dtype == np.bool_:
        return jnp.packbits(jnp.ravel(array))
    if _by_bytes(array.dtype):
        array = jax.lax.bitcast_convert_type(jnp.asarray(array), jnp.uint8)
    return array.reshape((1,)) if array.ndim == 0 else array


def _by_bytes(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1


def _restored(array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> jax.Array:
    if dtype == "bool":
        count = int(np.prod(shape))
        return jnp.asarray(np.unpackbits(array, count=count).astype(bool).reshape(shape))
    wanted = jnp.dtype(dtype)
    if _by_bytes(wanted):
        array = array.view(wanted)
    return jnp.asarray(array.reshape(shape))


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


def load(path: str | Path) -> PyTree:
    """Reads a tree that `save` wrote. Inverse of `save`; needs no template.

    Args:
      path: the folder.

    Returns:
      The tree, arrays on the default device. float64 needs `jax_enable_x64`, as always in JAX.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a folder of another origin, or one that is incomplete or damaged.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp() + "/masks"
      >>> _ = jp.export.save(folder, {"w": jnp.array([True, False])})
      >>> jp.export.load(folder)
      {'w': Array([ True, False], dtype=bool)}
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"path: {path} does not exist")
    manifest = _manifest(path)
    for name, (size, checksum) in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(
                f"path: {path} is incomplete: {name} is missing; copy or save it again"
            )
        if file.stat().st_size != size or _fingerprint(file)[1] != checksum:
            raise ValueError(
                f"path: {path} is damaged: {name} has {file.stat().st_size} bytes of {size}, or "
                "other content; copy or save it again"
            )
    return decode(manifest["tree"], _read(path, manifest["arrays"]))


def _read(folder: Path, entries: list[dict[str, Any]]) -> list[jax.Array]:
    names = [str(i) for i, entry in enumerate(entries) if np.prod(entry["shape"])]
    stored: dict[str, Any] = {}
    if any("coding" in entry for entry in entries):
        stored = _read_coded(folder / _CODED, entries)
    elif names:
        import orbax.checkpoint as ocp

        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        request = ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=arguments)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            stored = checkpointer.restore(folder / "arrays", request)
    return [
        _restored(np.asarray(stored[str(i)]), entry["dtype"], tuple(entry["shape"]))
        if str(i) in stored
        else jnp.zeros(entry["shape"], entry["dtype"])
        for i, entry in enumerate(entries)
    ]


def _manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
    if not file.is_file():
        raise ValueError(
            f"path: {path} is no jaxprune checkpoint (it has no {_MANIFEST}); Orbax checkpoints of "
            "other programs are read with orbax.checkpoint, and saved here with jp.export.save"
        )
    try:
        manifest = json.loads(file.read_text())
        known = manifest["format"] == _FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path: {file} is damaged; copy or save it again") from error
    if not known:
        raise ValueError(f"path: {path} is no jaxprune checkpoint: format {manifest['format']!r}")
    if manifest["version"] > _VERSION:
        raise ValueError(f"path: {path} was written by a newer jaxprune; upgrade")
    return manifest


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _fingerprint(file: Path) -> tuple[int, int]:
    size = checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def disk_bytes(path: str | Path) -> int:
    """Bytes of all files in a folder.

    Example:
      >>> import tempfile
      >>> jp.export.disk_bytes(tempfile.mkdtemp())
      0
    """
    return sum(file.stat().st_size for file in _files(Path(path)))
