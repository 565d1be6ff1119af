"""A teacher's outputs, computed once and kept on disk."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune._progress import track
from jaxprune._types import Params
from jaxprune.runtime import compressed

_FILE, _ABOUT = "outputs.npy", "about.json"


def precompute(
    path: str | Path,
    fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    dtype: Any = np.float16,
    overwrite: bool = False,
) -> np.ndarray:
    """Runs a teacher over data and keeps what it says, example by example, in one file.

    Args:
      path: the folder to make.
      fn: `fn(params, *inputs) -> (batch, …)`.
      params: any tree, compressed leaves included.
      batches: tuples, each what follows `params` in `fn`; a lone array counts as a one-tuple.
      dtype: in which outputs are kept.
      overwrite: replace what is there.

    Returns:
      The outputs, mapped from disk: `outputs[index]` gives those of some examples.
      `jp.distill.load_outputs` opens them again.

    Raises:
      FileExistsError: the path exists and `overwrite` is not set.
      ValueError: no batches, or outputs of unequal shapes. Nothing is left half-written.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp() + "/teacher"
      >>> fn = lambda p, x: x @ p
      >>> outputs = jp.distill.precompute(folder, fn, jnp.eye(2), [jnp.ones((3, 2)), jnp.zeros((1, 2))])
      >>> outputs.shape, jp.distill.load_outputs(folder)[2:].tolist()
      ((4, 2), [[1.0, 1.0], [0.0, 0.0]])
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; choose another, or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    run = jax.jit(compressed(fn))
    count, shape = 0, None
    try:
        with (work / "raw").open("wb") as stream:
            for batch in track(batches, "precompute"):
                args = batch if isinstance(batch, tuple) else (batch,)
                found = np.asarray(run(params, *args)).astype(dtype)
                if shape is not None and found.shape[1:] != shape:
                    raise ValueError(
                        f"batches: outputs of {found.shape[1:]} after some of {shape}; pad inputs to one "
                        "length"
                    )
                count, shape = count + found.shape[0], found.shape[1:]
                found.tofile(stream)
        if shape is None:
            raise ValueError("batches: expected at least one, got none (an exhausted iterator?)")
        raw = np.memmap(work / "raw", dtype, "r", shape=(count, *shape))
        np.save(work / _FILE, raw)
        del raw
        (work / "raw").unlink()
        (work / _ABOUT).write_text(json.dumps({"examples": count, "shape": list(shape)}))
        if path.exists():
            shutil.rmtree(path)
        work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return load_outputs(path)


def load_outputs(path: str | Path) -> np.ndarray:
    """What `precompute` kept, mapped from disk.

    Args:
      path: the folder.

    Returns:
      (examples, …), read where it is indexed.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a folder of another origin, or an incomplete one.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp() + "/teacher"
      >>> _ = jp.distill.precompute(folder, lambda p, x: x + p, 1.0, [jnp.zeros((2, 1))])
      >>> jp.distill.load_outputs(folder).ravel().tolist()
      [1.0, 1.0]
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: {path} does not exist")
    try:
        about = json.loads((path / _ABOUT).read_text())
        found = np.load(path / _FILE, mmap_mode="r")
        whole = found.shape == (about["examples"], *about["shape"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"path: {path} holds no precomputed outputs, or damaged ones") from error
    if not whole:
        raise ValueError(f"path: {path} is incomplete; compute it again")
    return found
