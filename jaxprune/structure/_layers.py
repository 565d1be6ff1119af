"""Depth: which layers of a residual network may go."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxprune import _trees
from jaxprune.graph import Graph, Group, iterations_of, residual_blocks


@dataclass(frozen=True)
class Layer:
    """A part of a network that is the identity once its parameters are masked.

    Attributes:
      name: common start of the paths of its parameters; of stacked layers, followed by `[index]`.
      leaves: positions of its parameters in flatten order, and for stacked ones the index.
      spans: `(before, after)` numbers of the values of the residual stream around each of its branches;
        for stacked layers, the operation that scans over them.
    """

    name: str
    leaves: tuple[tuple[int, int | None], ...]
    spans: tuple[tuple[int, int], ...]


def layers(graph: Graph, *, pattern: str | None = None) -> tuple[Layer, ...]:
    """The layers that may go: residual branches, and iterations of scans over stacked layers.

    A branch counts when its own parameters, masked, make it zero, so that the stream passes unchanged.

    Args:
      graph: from `jp.trace`.
      pattern: regular expression searched in the paths of parameters; branches where it finds the same
        text are one layer: `"layer_[0-9]+/"` joins the attention and the neurons of a transformer's
        layer. By default each branch is a layer.

    Returns:
      The layers in the order of execution.

    Raises:
      ValueError: `pattern` fits no branch.

    Example:
      >>> tree = {"in": jnp.ones((4, 4)), "up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> def fn(p, x):
      ...     h = x @ p["in"]
      ...     return h + jax.nn.relu(h @ p["up"]) @ p["down"]
      >>> [layer.name for layer in jp.structure.layers(jp.trace(fn, tree, jnp.ones((1, 4))))]
      ['down, up']
    """
    regex = _trees.compile_pattern(pattern, parameter="pattern") if pattern else None
    found: dict[str, Layer] = {}
    for block in residual_blocks(graph):
        paths = [graph.paths[i] for i in block.leaves]
        name = _common(paths)
        if regex is not None:
            hit = next((m for m in map(regex.search, paths) if m), None)
            name = hit[0].strip("/") if hit else name
        leaves = tuple((i, None) for i in block.leaves)
        spans = ((block.before, block.after),)
        if name in found and regex is not None:
            old = found[name]
            found[name] = Layer(name, old.leaves + leaves, old.spans + spans)
        else:
            found[_unused(name, found)] = Layer(_unused(name, found), leaves, spans)
    for group in graph.groups:
        if group.kind == "layers":
            found.update({layer.name: layer for layer in _iterations(graph, group)})
    if pattern and regex and not any(regex.search(p) for p in graph.paths):
        raise ValueError(_trees.no_match(pattern, graph.paths, parameter="pattern"))
    return tuple(found.values())


def _common(paths: Sequence[str]) -> str:
    """The module that all paths lie in, or the modules, or the leaves where there are no modules."""
    modules = list(dict.fromkeys(re.split(r"[/.](?=[^/.]*$)", path)[0] for path in paths))
    same = 0
    for letters in zip(*(f"{module}/" for module in modules), strict=False):
        if len(set(letters)) > 1:
            break
        same += 1
    shared = f"{modules[0]}/"[:same]
    shared = shared[: max(shared.rfind("/"), shared.rfind("."), 0)]
    return shared if "/" in shared or "." in shared else ", ".join(modules)


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    number = 1
    while (candidate := name if number == 1 else f"{name} ({number})") in taken:
        number += 1
    return candidate


def _iterations(graph: Graph, group: Group) -> list[Layer]:
    """The iterations of one scan, first to last."""
    own = dict(zip(graph.paths, graph.own, strict=True))
    path, axis = group.members[0]
    order = graph.solution.label[own[path].ids[axis]]
    (operation,) = [
        number
        for number, ids in iterations_of(graph).items()
        if graph.solution.label[ids[0]] == order[0]
    ][:1]
    positions = [graph.paths.index(path) for path, axis in group.members if axis == 0]
    prefix = _common([graph.paths[i] for i in positions])
    return [
        Layer(f"{prefix}[{i}]", tuple((p, i) for p in positions), ((operation, i),))
        for i in range(len(order))
    ]


def some_layers(graph: Graph, pattern: str | None) -> tuple[Layer, ...]:
    """The layers that may go; an error where there are none."""
    found = layers(graph, pattern=pattern)
    if not found:
        raise ValueError(
            "graph: no layer may go: no branch with parameters of its own is added to the value that it "
            "came from, and no scan runs over stacked layers that are the identity when masked"
        )
    return found
