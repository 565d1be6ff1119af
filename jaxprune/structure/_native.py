"""The smaller native configuration that masks leave, and which layers of the old network it holds."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune._types import Masks
from jaxprune.graph import Graph, Group, places_of
from jaxprune.structure._layers import layers

_KEYS = {
    "stream": "embed",
    "heads": "num_heads",
    "kv heads": "num_kv_heads",
    "queries per kv head": "queries_per_kv_head",
    "head dim": "head_dim",
    "neurons": "mlp",
    "channels": "channels",
    "experts": "experts",
    "states": "states",
    "layers": "layers",
}


def widths_by_label(graph: Graph, masks: Masks) -> dict[str, int]:
    """How many entries of an axis the units left of each group take, by its label."""
    gone = graph.removal(masks).units
    return {
        group.label: int((~gone[group.units]).sum()) * _entries(graph, group)
        for group in graph.groups
    }


def _entries(graph: Graph, group: Group) -> int:
    """How many entries a unit takes of its axis: two, where rotary embeddings pair them."""
    found = []
    for place in places_of(graph, group):
        own = place.slices[place.units == 0]
        labels = graph.solution.label[graph.own[place.leaf].ids[place.axis][own]]
        position, units = graph.solution.factors(labels)
        others = [units[(position == i) & (units != group.units[0])] for i in range(len(own))]
        found.append(len(own) // len({tuple(sorted(x.tolist())) for x in others}))
    return max(min(found), 1)


def widths_by_kind(graph: Graph, masks: Masks) -> dict[str, int]:
    """One number per kind, as native modules take them; see `widths`.

    Raises:
      ValueError: groups of a kind that are left with different widths.
    """
    left = widths_by_label(graph, masks)
    alive = [group for group in graph.groups if left[group.label]]
    found = {}
    for kind, key in _KEYS.items():
        own = [group for group in alive if group.kind == kind]
        if own:
            found[key] = _one_width(kind, {group.label: left[group.label] for group in own})
    if "queries_per_kv_head" in found:
        found["num_heads"] = found.pop("queries_per_kv_head") * found.get("num_kv_heads", 1)
    if "layers" not in found:
        depth = _depth(graph.groups, alive)
        found |= {} if depth is None else {"layers": depth}
    return found


def _one_width(kind: str, left: Mapping[str, int]) -> int:
    if len(set(left.values())) > 1:
        few = ", ".join(f"{label}: {n}" for label, n in list(left.items())[:6])
        raise ValueError(
            f"masks: the {kind} differ ({few}), which a native module with one width cannot hold; make "
            'masks of equal widths: unit_masks(scope="leaf"), or take each width: widths(by="label")'
        )
    return next(iter(left.values()))


def _depth(groups: Sequence[Group], alive: Sequence[Group]) -> int | None:
    """The number of unrolled layers left; `None` where there is no attention to count."""
    heads = ("heads", "kv heads")
    if not any(group.kind in heads for group in groups):
        return None
    attention = sum(group.kind in heads for group in alive)
    before = sum(group.kind in heads for group in groups)
    neurons = [sum(g.kind == "neurons" for g in some) for some in (groups, alive)]
    if neurons[0] == before and neurons[1] != attention:
        raise ValueError(
            f"masks: {attention} attentions and {neurons[1]} blocks of neurons are left, which a native "
            'module of whole layers cannot hold; join the branches of a layer: layer_masks(pattern="...")'
        )
    return attention


def layer_map(graph: Graph, masks: Masks, *, pattern: str | None = None) -> dict[str, str]:
    """Which layer of the teacher each layer of the student is: for `distill.objective`.

    Args:
      graph: from `jp.trace`, of the teacher.
      masks: tree of bools like its parameters, such as those of `layer_masks`.
      pattern: what counts as one layer, see `layers`.

    Returns:
      By name of a layer of the student, in order, the name of the teacher's. Stacked layers are numbered
      anew (`layers[1]`: `layers[3]`); others keep their paths, which `student_at` and `teacher_at` share.

    Raises:
      ValueError: masks of another tree, or no layer that is left.

    Example:
      >>> tree = {"up": jnp.ones((3, 4, 8)), "down": jnp.ones((3, 8, 4))}
      >>> layer = lambda h, p: (h + jnp.tanh(h @ p["up"]) @ p["down"], None)
      >>> graph = jp.trace(lambda p, x: jax.lax.scan(layer, x, p)[0], tree, jnp.ones((1, 4)))
      >>> keep = jnp.array([True, False, True])[:, None, None]
      >>> jp.structure.layer_map(graph, {"up": keep, "down": keep})
      {'down, up[0]': 'down, up[0]', 'down, up[1]': 'down, up[2]'}
    """
    graph.removal(masks)  # refuses masks of another tree
    flags = [np.asarray(mask) for mask in graph.treedef.flatten_up_to(masks)]
    found: dict[str, str] = {}
    count: dict[str, int] = {}
    for layer in layers(graph, pattern=pattern):
        left = [
            flags[i][index]
            if index is not None and flags[i].ndim and len(flags[i]) > 1
            else flags[i]
            for i, index in layer.leaves
        ]
        if not any(np.any(x) for x in left):
            continue
        if layer.leaves[0][1] is None:
            found[layer.name] = layer.name
            continue
        stem = layer.name.rpartition("[")[0]
        found[f"{stem}[{count.get(stem, 0)}]"] = layer.name
        count[stem] = count.get(stem, 0) + 1
    if not found:
        raise ValueError("masks: no layer is left, or the function has none that may go")
    return found
