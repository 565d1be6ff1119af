"""What a saved function takes after its parameters: described for files, and matched in calls."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxprune import _trees
from jaxprune._types import PyTree, is_compressed
from jaxprune.export._signature import form_of
from jaxprune.program import is_traced_input

_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def names_of(fn: Callable[..., Any], count: int) -> list[str]:
    """Names of the positional arguments after the parameters: those that `fn` has, or `args[i]`."""
    try:
        parameters = [*inspect.signature(fn).parameters.values()][1:]
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in _KINDS]
    return [names[i] if i < len(names) else f"args[{i}]" for i in range(count)]


def abstract(
    named: Mapping[str, PyTree], symbolic: Mapping[str, Any], constraints: Sequence[str]
) -> dict[str, PyTree]:
    """Arguments with shapes in place of arrays, symbolic where a specification says so.

    Raises:
      ValueError: a specification of no argument, or one that does not fit its array.
    """
    unknown = [name for name in symbolic if name not in named]
    if unknown:
        raise ValueError(
            f"symbolic: {unknown[0]!r} is no argument; expected some of {', '.join(named)}"
        )
    scope = _scope(named, constraints)
    return {name: _abstract(name, x, symbolic.get(name), scope) for name, x in named.items()}


def _scope(named: Mapping[str, PyTree], constraints: Sequence[str]) -> Any:
    """The scope of sizes: that of the arguments that have some, or a new one."""
    leaves = jax.tree.leaves(dict(named))
    dims = [d for x in leaves for d in getattr(x, "shape", ()) if jax.export.is_symbolic_dim(d)]
    if dims and constraints:
        raise ValueError(
            "constraints: the sizes among args are symbolic already; state constraints where they are "
            "made (jax.export.SymbolicScope)"
        )
    return dims[0].scope if dims else jax.export.SymbolicScope(tuple(constraints))


def _abstract(name: str, tree: PyTree, spec: Any, scope: Any) -> PyTree:
    specs, used = dict(zip(*_trees.flatten(spec)[:2], strict=True)), set()
    for path, text in specs.items():
        if not isinstance(text, str):
            raise ValueError(
                f"symbolic: {_place(name, path)!r} is {text!r}, expected a string such as 'b, t, ...'"
            )

    def struct(path: str, leaf: Any) -> Any:
        if is_compressed(leaf) or not is_traced_input(leaf):
            return leaf if not is_compressed(leaf) else jax.tree.map(struct_of, leaf)
        fits = [p for p in specs if p in ("", path) or path.startswith(f"{p}/")]
        if not fits:
            return struct_of(leaf)
        nearest = max(fits, key=len)
        used.add(nearest)
        try:
            shape = jax.export.symbolic_shape(specs[nearest], like=np.shape(leaf), scope=scope)
        except ValueError as error:
            raise ValueError(
                f"symbolic: {specs[nearest]!r} does not fit {_place(name, path)!r} of shape "
                f"{np.shape(leaf)}: {str(error).splitlines()[0]}"
            ) from error
        return jax.ShapeDtypeStruct(shape, struct_of(leaf).dtype)

    found = _trees.map_with_path(struct, tree)
    for path in specs:
        if path not in used:
            raise ValueError(f"symbolic: {_place(name, path)!r} is no array among the arguments")
    return found


def struct_of(x: Any) -> jax.ShapeDtypeStruct:
    weak = isinstance(x, float) or bool(getattr(x, "weak_type", False))
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(x), dtype, weak_type=weak)


def described(named: Mapping[str, PyTree]) -> tuple[dict[str, Any], list[Any]]:
    """Leaves of each argument by path, and the arrays in order. See `matched`."""
    arrays: list[Any] = []
    found = {}
    for name, tree in named.items():
        found[name] = []
        for path, leaf in zip(*_trees.flatten(tree)[:2], strict=True):
            if not is_compressed(leaf) and not is_traced_input(leaf):
                found[name].append({"path": path, "static": _static(leaf)})
                continue
            parts = jax.tree.leaves(leaf)
            found[name].append({"path": path, "count": len(parts), "form": form_of(leaf)})
            arrays += parts
    return found, arrays


def _static(value: Any) -> Any:
    is_plain = value is None or type(value) in (bool, int, str)
    return {"value": value} if is_plain else {"repr": repr(value)}


def aval(x: Any) -> dict[str, Any]:
    """Shape and dtype in JSON; symbolic sizes as text."""
    shape = [n if isinstance(n, int) else str(n) for n in x.shape]
    return {"shape": shape, "dtype": str(x.dtype)}


def shown(entry: Mapping[str, Any]) -> str:
    """Shape and dtype as an error shows them: `float32[b, 4]`."""
    return f"{entry['dtype']}[{', '.join(map(str, entry['shape']))}]"


def _place(name: str, path: str) -> str:
    return f"{name}/{path}" if path else name


def matched(
    known: Mapping[str, Any],
    positional: Sequence[str],
    avals: Sequence[Mapping[str, Any]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[Any]:
    """The arrays of a call in order, checked against what was `described`.

    Raises:
      TypeError: arguments that are missing, unknown or given twice.
      ValueError: an array of another shape or dtype, another container, another static value.
    """
    given = _bound(known, positional, args, kwargs)
    arrays: list[Any] = []
    sizes: dict[str, tuple[int, str]] = {}
    for name, expected in known.items():
        if name not in given:
            continue
        own = dict(zip(*_trees.flatten(given[name])[:2], strict=True))
        _check_paths(name, own, [leaf["path"] for leaf in expected])
        for leaf in expected:
            place, value = _place(name, leaf["path"]), own[leaf["path"]]
            if "static" in leaf:
                _check_static(place, leaf["static"], value)
                continue
            if form_of(value) != leaf["form"]:
                raise ValueError(
                    f"{place}: expected {form_name(leaf['form'])}, got {form_name(form_of(value))}, "
                    "or one with other static fields"
                )
            parts = jax.tree.leaves(value)
            entries = avals[len(arrays) : len(arrays) + leaf["count"]]
            arrays += [fitted(place, x, e, sizes) for x, e in zip(parts, entries, strict=True)]
    return arrays


def _bound(
    known: Mapping[str, Any], positional: Sequence[str], args: tuple[Any, ...], kwargs: Any
) -> dict[str, Any]:
    listed = ", ".join(known) or "none"
    if len(args) > len(positional):
        raise TypeError(
            f"args: expected at most {len(positional)} positional arguments after the parameters, got "
            f"{len(args)}; the model was saved with {listed}"
        )
    given = dict(zip(positional, args, strict=False))
    for name, value in kwargs.items():
        if name not in known:
            raise TypeError(f"{name}: no argument that the model was saved with; it has {listed}")
        if name in given:
            raise TypeError(f"{name}: given twice, by position and by name")
        given[name] = value
    for name, leaves in known.items():
        if name not in given and any("static" not in leaf for leaf in leaves):
            raise TypeError(f"{name}: missing; the model was saved with {listed}")
    return given


def _check_paths(name: str, own: Mapping[str, Any], expected: list[str]) -> None:
    missing = [path for path in expected if path not in own]
    extra = [path for path in own if path not in expected]
    if missing or extra:
        kind, path = ("missing", missing[0]) if missing else ("unexpected", extra[0])
        raise ValueError(
            f"{name}: {kind} {_place(name, path)!r}; expected "
            f"{', '.join(repr(_place(name, p)) for p in expected[:6]) or 'nothing (None)'}"
        )


def _check_static(place: str, expected: Mapping[str, Any], value: Any) -> None:
    if _static(value) != expected:
        saved = expected.get("repr", repr(expected.get("value")))
        raise ValueError(
            f"{place}: the model was saved with the fixed value {saved}, got {value!r}; save another "
            "model for it, or save with an array (jnp.int32(…)) to have it vary"
        )


def form_name(form: Any) -> str:
    """What a leaf is, in words."""
    return "an array" if form is None else f"a {form['type']}"


def fitted(place: str, x: Any, entry: Mapping[str, Any], sizes: dict[str, tuple[int, str]]) -> Any:
    """An array that fits what is expected; numbers become arrays. `sizes` holds symbolic ones."""
    if not hasattr(x, "dtype"):
        x = _number(place, x, entry)
    got = {"shape": list(np.shape(x)), "dtype": str(struct_of(x).dtype)}
    fits = got["dtype"] == entry["dtype"] and len(got["shape"]) == len(entry["shape"])
    if not fits or not all(
        n == m or isinstance(m, str) or not isinstance(n, int)
        for n, m in zip(got["shape"], entry["shape"], strict=True)
    ):
        cast = f"; cast it: .astype('{entry['dtype']}')" if got["dtype"] != entry["dtype"] else ""
        raise ValueError(f"{place}: expected {shown(entry)}, got {shown(got)}{cast}")
    for n, m in zip(got["shape"], entry["shape"], strict=True):
        if isinstance(m, str) and m.isidentifier() and isinstance(n, int):
            size, where = sizes.setdefault(m, (n, place))
            if size != n:
                raise ValueError(
                    f"{place}: expected {shown(entry)} with {m} = {size} as in {where}, got {shown(got)}"
                )
    return x


def _number(place: str, x: Any, entry: Mapping[str, Any]) -> Any:
    wanted = jnp.dtype(entry["dtype"])
    is_whole = isinstance(x, (bool, int)) and jnp.issubdtype(wanted, jnp.number)
    if is_whole or (isinstance(x, float) and jnp.issubdtype(wanted, jnp.floating)):
        return jnp.asarray(x, wanted)
    raise ValueError(f"{place}: expected {shown(entry)}, got {x!r}")
