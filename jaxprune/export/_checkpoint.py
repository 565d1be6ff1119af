"""Trees to folders and back, through Orbax.

A checkpoint is a folder with `arrays/` (an Orbax checkpoint; masks at one bit per entry), or `arrays.bin`
(entropy-coded), and `manifest.json`: the tree's structure, the size and checksum of every file, and a
checksum of its own. It is written under a temporary name and renamed, so a folder of the final name is
always whole.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _trees
from jaxprune._types import PyTree
from jaxprune.export import _folder
from jaxprune.export._entropy import coded, decoded
from jaxprune.export._structure import decode, encode

_CODED = "arrays.bin"
_VERSION = 2


def save(path: str | Path, tree: PyTree, *, overwrite: bool = False, entropy: bool = False) -> Path:
    """Writes a tree to a folder. Inverse of `load`.

    Args:
      path: the folder to make; its parents are made as needed.
      tree: arrays, masks, compressed leaves, numbers and strings in dicts, lists, tuples, named
        tuples (optimizer states), `FrozenDict` or `nnx.State`; also the pair that `jp.compact` returns:
        `compact_fn, small = jp.export.load(path)`, then `compact_fn = compact_fn.of(fn)`.
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
    path = _folder.destination(path, overwrite=overwrite)
    structure, arrays = encode(tree, symbols=entropy)
    coding: dict[str, Any] = {}
    with _folder.written(path) as work:
        stored = stored_arrays(arrays)
        if entropy:
            coding = _write_coded(work / _CODED, stored)
        elif stored:
            import orbax.checkpoint as ocp  # slow to import: when files are written

            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(work / "arrays", stored)
        content = {
            "format": _folder.CHECKPOINT,
            "version": _VERSION,
            "tree": structure,
            "arrays": [
                {"dtype": str(a.dtype), "shape": list(np.shape(a)), **coding.get(str(i), {})}
                for i, a in enumerate(arrays)
            ],
        }
        _folder.seal(work, content)
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


def stored_arrays(arrays: list[Any]) -> dict[str, Any]:
    """Arrays as files hold them, by number; empty ones have no place there: their shape says all."""
    return {str(i): _stored(array) for i, array in enumerate(arrays) if np.size(array)}


def _stored(array: Any) -> Any:
    """The array as Orbax keeps it: bools as bits, scalars with an axis, small floats as bytes."""
    array = np.asarray(array) if np.ndim(array) == 0 else array
    if array.dtype == np.bool_:
        return jnp.packbits(jnp.ravel(array))
    if _by_bytes(array.dtype):
        array = jax.lax.bitcast_convert_type(jnp.asarray(array), jnp.uint8)
    return array.reshape((1,)) if array.ndim == 0 else array


def _by_bytes(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1


def _restored(array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> jax.Array | np.ndarray:
    """What was stored. Numbers of 64 bits stay with NumPy where JAX has none."""
    kind, stored = _stored_form(dtype, shape)
    if array.dtype != kind or array.shape != stored:
        raise ValueError(f"an array of {array.dtype} {array.shape}, expected {kind} {stored}")
    if dtype == "bool":
        count = int(np.prod(shape))
        return jnp.asarray(np.unpackbits(array, count=count).astype(bool).reshape(shape))
    wanted = jnp.dtype(dtype)
    found = (array.view(wanted) if _by_bytes(wanted) else array).reshape(shape)
    return found if jax.dtypes.canonicalize_dtype(wanted) != wanted else jnp.asarray(found)


def load(path: str | Path, *, like: PyTree | None = None, sharding: Any = None) -> PyTree:
    """Reads a tree that `save` wrote. Inverse of `save`; needs no template.

    Args:
      path: the folder.
      like: a tree of the same structure, shapes and dtypes (arrays, or `jax.ShapeDtypeStruct` with a
        sharding); every array is placed as its counterpart is.
      sharding: where to place arrays: a `jax.sharding.Sharding` for all, or a tree of them, which may end
        above the leaves, as in `jax.device_put`. By default the default device.

    Returns:
      The tree. Numbers of 64 bits are NumPy arrays unless `jax_enable_x64` is set.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a folder of another origin, or one that is incomplete or damaged; another tree than
        `like`.

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
    if like is not None and sharding is not None:
        raise ValueError("like, sharding: expected at most one")
    try:
        manifest = _folder.manifest(path, _folder.CHECKPOINT, _VERSION)
        _folder.check_files(path, manifest["files"])
        tree = decode(manifest["tree"], _read(path, manifest["arrays"]))
    except _folder.Refused:
        raise
    except Exception as error:
        raise ValueError(f"path: {path} is damaged: {error}; copy or save it again") from error
    if like is not None:
        return _placed_like(tree, like)
    return tree if sharding is None else _put(tree, sharding)


def _put(tree: PyTree, sharding: Any) -> PyTree:
    """The tree with its arrays placed; what holds none stays as it is."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]
    arrays = treedef.unflatten(x if a else 0 for x, a in zip(leaves, is_array, strict=True))
    placed = jax.tree.leaves(jax.device_put(arrays, sharding))
    return treedef.unflatten(
        p if a else x for p, a, x in zip(placed, is_array, leaves, strict=True)
    )


def _placed_like(tree: PyTree, like: PyTree) -> PyTree:
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    if jax.tree.structure(like) != structure:
        like = _checks.aligned("like", like, "the file", tree)
    if jax.tree.structure(like) != structure:
        raise ValueError("like: expected the structure of the file; static fields of leaves differ")
    placed = []
    for (path, leaf), model in zip(found, jax.tree.leaves(like), strict=True):
        mine, theirs = ((np.shape(x), getattr(x, "dtype", type(x))) for x in (leaf, model))
        if mine != theirs:
            raise ValueError(
                f"like: leaf {_trees.path_str(path)!r} is {theirs}, in the file {mine}"
            )
        where = getattr(model, "sharding", None)
        placed.append(leaf if where is None else jax.device_put(leaf, where))
    return structure.unflatten(placed)


def _read(folder: Path, entries: list[dict[str, Any]]) -> list[jax.Array | np.ndarray]:
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


def disk_bytes(path: str | Path) -> int:
    """Bytes of all files in a folder.

    Example:
      >>> import tempfile
      >>> jp.export.disk_bytes(tempfile.mkdtemp())
      0
    """
    return sum(file.stat().st_size for file in _folder.files(Path(path)))
