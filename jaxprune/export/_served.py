"""A model of `save_model`, run without its code."""

from pathlib import Path
from typing import Any

import jax
import jax.export

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree
from jaxprune.export import _folder
from jaxprune.export._arguments import fitted, form_name, matched, shown, struct_of
from jaxprune.export._checkpoint import load
from jaxprune.export._model import PARAMS, VERSION, check_flatbuffers
from jaxprune.export._signature import built, form_of


class LoadedModel:
    """A function and its parameters, from `load_model`.

    Called with the arguments that the function had after its parameters, by position or by name. It jits,
    maps over further batches where sizes are symbolic, and donates nothing; compiled once per shape.

    Attributes:
      params: the parameters, in dicts, lists and tuples; compressed leaves as they were saved.
      platforms: those that the folder has a program for.
    """

    def __init__(self, manifest: dict[str, Any], params: Params, exported: Any) -> None:
        """Made by `load_model`."""
        self.params = params
        self.platforms = tuple(manifest["programs"])
        self.__name__ = manifest["name"]
        self._manifest = manifest
        self._leaves, self._treedef = jax.tree.flatten(params)
        self._run = jax.jit(exported.call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._outputs(self._leaves, args, kwargs)

    def apply(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """The function with other parameters, such as ones trained on.

        Args:
          params: a tree with the paths, shapes, dtypes and compressed leaves of `self.params`.
          *args, **kwargs: as in a call.

        Raises:
          ValueError: parameters or arguments that do not fit, named.
          TypeError: arguments that are missing, unknown or given twice.
        """
        return self._outputs(self._fitting(params), args, kwargs)

    @property
    def signature(self) -> str:
        """Name, and what it takes: `step(tokens: int32[b, t])`."""
        rest, texts = iter(self._manifest["inputs"]), []
        for name, leaves in self._manifest["arguments"].items():
            parts = []
            for leaf in leaves:
                prefix = f"{leaf['path']}: " if leaf["path"] else ""
                if "static" in leaf:
                    parts.append(prefix + repr(leaf["static"].get("value", leaf["static"])))
                    continue
                parts.append(prefix + ", ".join(shown(next(rest)) for _ in range(leaf["count"])))
            inside = ", ".join(parts) or "None"
            texts.append(f"{name}: {inside if len(leaves) == 1 else '{' + inside + '}'}")
        return f"{self.__name__}({', '.join(texts)})"

    def __repr__(self) -> str:
        return f"LoadedModel({self.signature}, platforms={self.platforms})"

    def _outputs(self, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = self._manifest
        names = known["positional"]
        arrays = matched(known["arguments"], names, known["inputs"], args, kwargs)
        try:
            outs = self._run(leaves, arrays)
        except ValueError as error:
            if "shape" not in str(error):
                raise
            raise ValueError(
                f"args: sizes that the model was not saved for; it is {self.signature}: "
                f"{str(error).split('Using the following')[0].strip()}"
            ) from error
        return built(known["output"], outs)

    def _fitting(self, params: Params) -> list[Any]:
        params = _checks.aligned("params", params, "saved params", self.params)
        paths, theirs, _ = _trees.flatten(params)
        for path, mine, leaf in zip(paths, _trees.flatten(self.params)[1], theirs, strict=True):
            parts = jax.tree.leaves(mine), jax.tree.leaves(leaf)
            if jax.tree.structure(mine) != jax.tree.structure(leaf):
                raise ValueError(
                    f"params: leaf {path!r} is {form_name(form_of(leaf))}, expected "
                    f"{form_name(form_of(mine))} with the static fields of the saved one"
                )
            for a, b in zip(*parts, strict=True):
                entry = {"shape": list(struct_of(a).shape), "dtype": str(struct_of(a).dtype)}
                fitted(f"params: leaf {path!r}", b, entry, {})
        return jax.tree.leaves(params)


def load_model(path: str | Path) -> LoadedModel:
    """Reads a model that `save_model` wrote; neither its code nor flax is needed.

    Args:
      path: the folder.

    Returns:
      A callable object with `.params`, for the platform of this process.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a folder of another origin, or one that is incomplete or damaged; programs for other
        platforms only, or of a newer JAX.
      ImportError: the package `flatbuffers` is missing.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp() + "/model"
      >>> fn = lambda params, x: x @ params["w"]
      >>> _ = jp.export.save_model(folder, fn, {"w": jnp.ones((4, 2))}, jnp.ones((3, 4)))
      >>> model = jp.export.load_model(folder)
      >>> model.signature
      '<lambda>(x: float32[3, 4])'
      >>> float(model.apply({"w": jnp.zeros((4, 2))}, x=jnp.ones((3, 4))).sum())
      0.0
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"path: {path} does not exist")
    check_flatbuffers()
    manifest = _folder.manifest(path, _folder.MODEL, VERSION)
    _folder.check_files(path, manifest["files"])
    platform = jax.export.default_export_platform()
    if platform not in manifest["programs"]:
        why = manifest["refused"].get(platform)
        raise ValueError(
            f"path: {path} has programs for {', '.join(manifest['programs'])}, and this process runs on "
            f"{platform}{f', for which it did not lower ({why})' if why else ''}; save it again with "
            f"platforms=[…, {platform!r}]"
        )
    program = (path / manifest["programs"][platform]).read_bytes()
    try:
        exported = jax.export.deserialize(bytearray(program))
    except Exception as error:
        raise ValueError(
            f"path: {path} holds a program of JAX {manifest['jax']}, which JAX {jax.__version__} cannot "
            f"read ({error}); upgrade JAX, or save the model again"
        ) from error
    return LoadedModel(manifest, _with_keys(load(path / PARAMS), manifest["keys"]), exported)


def _with_keys(tree: PyTree, keys: dict[str, str]) -> PyTree:
    """The tree with typed keys of random numbers in place of their data."""
    leaves, treedef = jax.tree.flatten(tree)
    for i, name in keys.items():
        leaves[int(i)] = jax.random.wrap_key_data(leaves[int(i)], impl=name)
    return treedef.unflatten(leaves)
