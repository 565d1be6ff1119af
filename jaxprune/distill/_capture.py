"""Intermediate values of any function, without editing it."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune import _trees
from jaxprune._types import Params
from jaxprune.program import (
    Executor,
    Kind,
    Operation,
    Program,
    inputs_of,
    primitive,
    same_numbers,
    trace_program,
)

_ENTERED = ("scan", "custom_vjp_call")  # others run parts of themselves, or none
_KINDS = ("param", "scope", "op", "name")

At = str | Sequence[str] | Mapping[str, str]


class Site(NamedTuple):
    """A value that can be captured.

    Attributes:
      kind: `"param"` (made with a parameter), `"scope"` (the last of a name scope), `"op"` or `"name"`
        (of `jax.ad_checkpoint.checkpoint_name`).
      label: path of the parameter, name of the scope, operation with its number, or the name given.
      number: of the value.
    """

    kind: str
    label: str
    number: int


def capture(
    fn: Callable[..., Any], params: Params, *args: Any, at: At, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Runs a function, and hands out values from within it.

    Traced once per call: call it inside of `jit`. Gradients flow through what is captured.

    Args:
      fn: `fn(params, *args, **kwargs)`: linen `apply`, a split nnx function, raw JAX, or a small
        function of `jp.compact`.
      params: any tree of arrays.
      *args, **kwargs: inputs.
      at: which values: a pattern, several, or a dict of a name for each. A pattern is a regular
        expression matched in full against one of
        - `param:` the path of a parameter: the product that reads it, the sum that adds it;
        - `scope:` a name scope (linen modules have one): the last value computed in it;
        - `op:` an operation and how many of its kind came before: `op:tanh/0`;
        - `name:` what `jax.ad_checkpoint.checkpoint_name` called a value.
        Without a prefix the first kind with a match counts, in this order. In loops over layers,
        values of all iterations are stacked.

    Returns:
      The outputs of `fn`, and a dict of values: by the names of `at`, or by label.

    Raises:
      ValueError: a pattern that matches nothing (near misses are listed), or several values where a name
        was given for one.

    Example:
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
      >>> params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4), "v": jnp.ones((4, 1))}
      >>> out, found = jp.distill.capture(fn, params, jnp.ones((2, 3)), at={"h": "op:tanh/0", "pre": "b"})
      >>> out.shape, found["h"].shape, float(found["pre"][0, 0])
      ((2, 1), (2, 4), 3.0)
    """
    paths, leaves, treedef = _trees.flatten(_trees.resolve_ties(params))
    dense = [_trees.dense(leaf) for leaf in leaves]
    inputs = inputs_of(args, kwargs)
    program = trace_program(fn, treedef.unflatten(dense), *args, **kwargs)
    origins = dict(zip(program.inputs, paths, strict=False))
    wanted = _select(at, _sites(program, origins))
    outs, found = _executor(wanted).run(program, [*dense, *inputs.arrays])
    return program.out_tree.unflatten(outs), {name: found[name] for name in wanted}


def _executor(wanted: Mapping[str, Site]) -> Executor:
    """Notes the wanted values; loops that hold some are entered, and stack those of all iterations."""
    numbers = {site.number for site in wanted.values()}

    def holds(operation: Operation) -> bool:
        inside = (op for program in operation.inner for op in program.operations)
        found = any(not numbers.isdisjoint(op.outs) or holds(op) for op in inside)
        if found and operation.name == "custom_vjp_call":
            warnings.warn(
                f"at: a value within a function with a gradient of its own, at {operation.source}, is "
                "captured: derivatives are those of its operations, not its own",
                stacklevel=3,
            )
        return found

    def note(operation: Operation, outs: list[Any]) -> dict[str, Any]:
        made = dict(zip(operation.outs, outs, strict=True))
        return {name: made[site.number] for name, site in wanted.items() if site.number in made}

    return Executor(note=note, enters=holds)


def sites(fn: Callable[..., Any], params: Params, *args: Any, **kwargs: Any) -> list[str]:
    """What `capture` can pick, as patterns for `at`.

    Args:
      fn: `fn(params, *args, **kwargs)`.
      params: any tree of arrays.
      *args, **kwargs: example inputs; only shapes matter.

    Returns:
      `kind:label` of every value.

    Example:
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"])
      >>> jp.distill.sites(fn, {"w": jnp.ones((3, 4))}, jnp.ones((2, 3)))
      ['param:w', 'op:dot_general/0', 'op:tanh/0']
    """
    paths = _trees.leaf_paths(params)
    program = trace_program(fn, params, *args, **kwargs)
    found = _sites(program, dict(zip(program.inputs, paths, strict=False)))
    order = sorted(found, key=lambda site: _KINDS.index(site.kind))
    return list(dict.fromkeys(f"{site.kind}:{site.label}" for site in order))


def _sites(program: Program, origins: dict[int, str]) -> list[Site]:
    """All values with a label, in order of execution; of a scope, its last value."""
    origins = dict(origins)
    found: list[Site] = []
    scopes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for operation in program.operations:
        name, ins = operation.name, operation.ins
        read = [origins[i] for i in ins if i in origins]
        part = primitive(name).kind is Kind.PART
        if ins and ins[0] in origins and (part or same_numbers(operation, views=True)):
            pairs = zip(ins, operation.outs, strict=False)
            origins.update({out: origins[i] for i, out in pairs if i in origins})
            if name != "name":
                continue
            read = []
        if name in _ENTERED:
            (inner,) = operation.inner
            known = {
                mine: origins[i] for mine, i in zip(inner.inputs, ins, strict=True) if i in origins
            }
            found += _sites(inner, known)
            read = []
        if not operation.outs:
            continue
        out = operation.outs[0]
        found += [Site("param", path, out) for path in dict.fromkeys(read)]
        number = counts.get(name, 0)
        counts[name] = number + 1
        found.append(Site("op", f"{name}/{number}", out))
        if name == "name":
            found.append(Site("name", operation.params["name"], out))
        parts = operation.scope.split("/") if operation.scope else []
        for depth in range(1, len(parts) + 1):
            scopes["/".join(parts[:depth])] = out
    return found + [Site("scope", label, number) for label, number in scopes.items()]


def _select(at: At, found: list[Site]) -> dict[str, Site]:
    """The sites by the names under which they are handed out."""
    if isinstance(at, Mapping):
        chosen = {}
        for name, pattern in at.items():
            hits = _matching(pattern, found)
            if len(hits) > 1:
                listed = ", ".join(f"{s.kind}:{s.label}" for s in hits[:5])
                raise ValueError(
                    f"at: {pattern!r} for {name!r} matches {len(hits)} values ({listed}); be more "
                    "precise, or give a list of patterns to get all"
                )
            chosen[name] = hits[0]
        return chosen
    patterns = [at] if isinstance(at, str) else list(at)
    return {site.label: site for pattern in patterns for site in _matching(pattern, found)}


def _matching(pattern: str, found: list[Site]) -> list[Site]:
    kind, colon, rest = pattern.partition(":")
    kinds = [kind] if colon and kind in _KINDS else list(_KINDS)
    text = rest if colon and kind in _KINDS else pattern
    regex = _trees.compile_pattern(text, parameter="at")
    for kind in kinds:
        hits: dict[str, Site] = {}
        for site in found:
            if site.kind == kind and regex.fullmatch(site.label):
                hits.setdefault(site.label, site)  # the first use of a parameter counts
        if hits:
            return list(hits.values())
    labels = [f"{site.kind}:{site.label}" for site in found if site.kind in kinds]
    raise ValueError(
        _trees.no_match(re.escape(text) if text in labels else text, labels, parameter="at")
    )
