"""A model in one folder: parameters, and its program lowered for several platforms.

A model is a folder with `params/` (what `save` writes), a StableHLO program per platform, serialized by
`jax.export` (`program-cpu.bin`), and `manifest.json`: what the program takes and gives, and the size and
checksum of every file. Weights are beside the programs, as arguments, never constants in them.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, is_compressed
from jaxprune.export import _folder
from jaxprune.export._arguments import abstract, aval, described, names_of, struct_of
from jaxprune.export._checkpoint import save
from jaxprune.export._signature import plain, structure_of
from jaxprune.runtime import lowered_for

VERSION = 1
PARAMS = "params"
PLATFORMS = ("cpu", "cuda", "tpu")
_ALL = (*PLATFORMS, "rocm")


def program_file(platform: str) -> str:
    """The file of a platform's program."""
    return f"program-{platform}.bin"


def save_model(
    path: str | Path,
    fn: Callable[..., Any],
    params: Params,
    *args: Any,
    symbolic: Mapping[str | int, Any] | None = None,
    constraints: Sequence[str] = (),
    platforms: Sequence[str] | None = None,
    overwrite: bool = False,
    entropy: bool = False,
    **kwargs: Any,
) -> Path:
    """Writes a function and its parameters to a folder that runs without their code.

    The folder holds the parameters, compressed ones as they are, and a StableHLO program of `fn` per
    platform, that takes them as an argument. `load_model` runs it in a process that has neither the
    model's code nor flax. It is written whole or not at all, with checksums.

    Args:
      path: the folder to make; its parents are made as needed.
      fn: `fn(params, *args, **kwargs)`: any traceable function, also `jp.compressed(fn)` (lowered for
        each platform as is best there), what `jp.compact` returns, and `nnx` modules in pure form,
        `lambda state, *args: nnx.merge(graphdef, state)(*args)`.
      params: its parameters. What is no dict, list or tuple (`nnx.State`, named tuples) is written as
        dicts of the same paths.
      *args: example inputs, arrays or `jax.ShapeDtypeStruct`; trees of them, such as caches. As in
        `jp.trace`, bools, ints and strings are fixed for good.
      symbolic: sizes that calls may choose, by name or position of the argument: `{"tokens": "b, t"}`.
        For a tree of arrays one text for all, `{"cache": "b, ..."}`, or a tree of them. `...` and `_`
        keep the sizes of the example. Shapes with symbolic sizes among `args` do as well. Products with
        compressed leaves choose for many rows where their number is symbolic: save a decode step of
        batch 1 with that size.
      constraints: what holds of symbolic sizes, such as `["t <= 2048", "mod(t, 8) == 0"]`, where tracing
        needs to know.
      platforms: of `"cpu"`, `"cuda"`, `"tpu"`, `"rocm"`, those to lower for, or an error; by default the
        first three, and a warning where one does not lower.
      overwrite: replace what is there; else an existing path is an error.
      entropy: see `save`.
      **kwargs: further example inputs.

    Returns:
      The path.

    Raises:
      FileExistsError: the path exists and `overwrite` is not set.
      ValueError: a function that does not lower, with the reason; specifications of sizes that fit no
        argument; parameters whose paths are not unique.
      TypeError: leaves that no file holds.
      ImportError: the package `flatbuffers` is missing.

    Warns:
      UserWarning: a platform of the default for which the function does not lower.

    Example:
      >>> import tempfile
      >>> fn = lambda params, x: jnp.tanh(x @ params["w"])
      >>> tree = jp.quantize_tree({"w": jnp.ones((16, 8))}, bits=4)
      >>> folder = tempfile.mkdtemp() + "/model"
      >>> x = jnp.ones((2, 16))
      >>> _ = jp.export.save_model(folder, jp.compressed(fn), tree, x, symbolic={"x": "b, _"})
      >>> model = jp.export.load_model(folder)
      >>> model(jnp.ones((5, 16))).shape
      (5, 8)
    """
    path = _folder.destination(path, overwrite=overwrite)
    _check_platforms(platforms)
    call = _call_of(fn, params, args, kwargs, symbolic or {}, constraints)
    programs, refused = _lowered(call, platforms or PLATFORMS, strict=platforms is not None)
    content = {
        "format": _folder.MODEL,
        "version": VERSION,
        "jax": jax.__version__,
        "name": getattr(fn, "__name__", type(fn).__name__),
        "arguments": call.arguments,
        "positional": call.positional,
        "inputs": [aval(x) for x in call.inputs],
        "keys": call.keys,
        "output": call.output[-1],
        "programs": {name: program_file(name) for name in programs},
        "refused": refused,
    }
    with _folder.written(path) as work:
        save(work / PARAMS, call.stored, entropy=entropy)
        for name, program in programs.items():
            (work / program_file(name)).write_bytes(program)
        _folder.seal(work, content)
    for name, reason in refused.items():
        warnings.warn(
            f"save_model: not lowered for {name}: {reason}; the model runs on {', '.join(programs)}",
            stacklevel=2,
        )
    return path


def _check_platforms(platforms: Sequence[str] | None) -> None:
    if isinstance(platforms, str) or (platforms is not None and not platforms):
        raise ValueError(f"platforms: expected a sequence such as ('cpu',), got {platforms!r}")
    for name in platforms or ():
        _checks.choice("platforms", name, _ALL)


class _Call(NamedTuple):
    """A function of lists of arrays, and what its lists mean.

    Attributes:
      run: `(leaves of params, arrays of arguments) -> list of outputs`; made anew for each trace.
      leaves, inputs: what it takes, as shapes.
      stored: the parameters as files hold them.
      keys: implementation of each leaf of them that is a typed key, by number.
      arguments, positional: see `described`.
      output: the structure of what the last trace gave.
    """

    run: Callable[[], Callable[..., list[Any]]]
    leaves: list[Any]
    inputs: list[Any]
    stored: PyTree
    keys: dict[str, str]
    arguments: dict[str, Any]
    positional: list[str]
    output: list[Any]


def _call_of(
    fn: Callable[..., Any],
    params: Params,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    symbolic: Mapping[str | int, Any],
    constraints: Sequence[str],
) -> _Call:
    positional = names_of(fn, len(args))
    by_name = {
        positional[k] if isinstance(k, int) and k < len(args) else str(k): v
        for k, v in symbolic.items()
    }
    named = abstract({**dict(zip(positional, args, strict=True)), **kwargs}, by_name, constraints)
    arguments, inputs = described(named)
    tree = _plain_params(params)
    leaves, treedef = jax.tree.flatten(tree)
    output: list[Any] = []

    def make() -> Callable[..., list[Any]]:
        def run(leaves: list[Any], arrays: list[Any]) -> list[Any]:
            own = _checks.aligned("params", treedef.unflatten(leaves), "params", params)
            given = _refilled(named, arrays)
            out = fn(own, *(given[name] for name in positional), **{k: given[k] for k in kwargs})
            found, out_tree = jax.tree.flatten(out)
            output.append(structure_of(out_tree.unflatten(range(len(found)))))
            return found

        return run

    is_key = [jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) for x in map(struct_of, leaves)]
    keys = {
        str(i): str(jax.random.key_impl(x))
        for i, (x, hit) in enumerate(zip(leaves, is_key, strict=True))
        if hit
    }
    stored = treedef.unflatten(
        jax.random.key_data(x) if hit else x for x, hit in zip(leaves, is_key, strict=True)
    )
    structs = [*map(struct_of, leaves)]
    return _Call(make, structs, inputs, stored, keys, arguments, positional, output)


def _plain_params(params: Params) -> PyTree:
    tree = plain(params)
    paths, leaves, _ = _trees.flatten(params)
    double = sorted({path for path in paths if paths.count(path) > 1})
    if double:
        raise ValueError(f"params: several leaves have the path {double[0]!r}; rename one of them")
    for path, leaf in zip(paths, leaves, strict=True):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float)):
            raise TypeError(
                f"params: leaf {path!r} is a {type(leaf).__name__}, expected an array; bind it to fn "
                "(functools.partial)"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"params: leaf {path!r} has a shape and no values; pass its array")
    return tree


def _refilled(named: Mapping[str, PyTree], arrays: list[Any]) -> dict[str, PyTree]:
    """Arguments with arrays in place of shapes, in the order of `described`."""
    rest = iter(arrays)

    def fill(path: str, leaf: Any) -> Any:
        if is_compressed(leaf):
            return jax.tree.map(lambda _: next(rest), leaf)
        return next(rest) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return {name: _trees.map_with_path(fill, tree) for name, tree in named.items()}


def _lowered(
    call: _Call, platforms: Sequence[str], *, strict: bool
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Serialized programs by platform, and why there is none."""
    check_flatbuffers()
    programs: dict[str, bytes] = {}
    errors: dict[str, Exception] = {}
    for name in platforms:
        try:
            with lowered_for(name):
                program = jax.export.export(jax.jit(call.run()), platforms=[name])
                programs[name] = bytes(program(call.leaves, call.inputs).serialize())
        except Exception as error:  # whatever tracing and lowering raise
            if strict:
                raise ValueError(f"platforms: not lowered for {name}: {_reason(error)}") from error
            errors[name] = error
    if not programs:
        name, error = next(iter(errors.items()))
        raise ValueError(f"fn: it lowers for no platform ({name}: {_reason(error)})") from error
    return programs, {name: _reason(error) for name, error in errors.items()}


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:400]


def check_flatbuffers() -> None:
    """Raises `ImportError`, with the cure, where `jax.export` cannot serialize."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "save_model, load_model: the package flatbuffers is missing; "
            "pip install 'jaxprune[export]'"
        )
