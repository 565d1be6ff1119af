"""Trees quantized from statistics: which leaves and formats, and what is told before any work."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _trees
from jaxprune._progress import track
from jaxprune._types import Params, PyTree, Where
from jaxprune.calibration import Stats
from jaxprune.quantize import Misfits, Rules, Spec, quantize, refuse_non_finite, specs_for
from jaxprune.reconstruct._matrices import Layout, chosen_leaves, layout_of, tell_unseen


class Seen(NamedTuple):
    """A leaf that was seen to multiply something.

    Attributes:
      position: in flatten order.
      stat, layout: its statistics, and how it lies as matrices.
      spec: its format.
    """

    position: int
    stat: Stats
    layout: Layout
    spec: Spec


class Plan(NamedTuple):
    """What is quantized, checked before any work.

    Attributes:
      params: the tree.
      specs: the format of each leaf, `None` where it stays dense.
      seen: the leaves with statistics, by position.
      hits: which leaves were chosen for those.
      who: the function's name.
    """

    params: Params
    specs: list[Spec | None]
    seen: dict[int, Seen]
    hits: list[bool]
    who: str


def format_of(bits: int | None, dtype: Any, **given: Any) -> Spec:
    """The format that is asked for: 4 bits where neither `bits` nor `dtype` is given."""
    bits = (8 if dtype is not None else 4) if bits is None else bits
    return Spec(bits=bits, dtype=dtype, **given)


def planned(
    params: Params, stats: PyTree, base: Spec, rules: Rules | None, where: Where, who: str
) -> Plan:
    """The formats and layouts of all leaves; tells of what groups do not divide.

    Raises:
      ValueError: see `chosen_leaves`, `layout_of` and `jp.quantize_tree`.
    """
    misfits = Misfits()
    paths, leaves, _, found, hits = chosen_leaves(params, stats, where, who)
    named = [re.escape(path) for path, hit in zip(paths, hits, strict=True) if hit]
    specs = specs_for(params, base, rules, named, stats, misfits)
    misfits.tell(stacklevel=4)
    seen = {
        i: Seen(i, found[i], layout_of(paths[i], tuple(leaves[i].shape), found[i]), spec)
        for i, spec in enumerate(specs)
        if spec is not None and found[i].axes
    }
    return Plan(params, specs, seen, hits, who)


def leaf_by_leaf(plan: Plan, unseen: str, one: Callable[[Array, Seen], Any]) -> PyTree:
    """The tree with `one(array, leaf)` for leaves with statistics, others rounded to nearest.

    `unseen` says what becomes of matrices that no row multiplied.
    """
    paths, leaves, treedef = _trees.flatten(plan.params)
    pairs = [(leaf.stat, leaf.layout) for leaf in plan.seen.values()]
    tell_unseen(plan.who, unseen, pairs, stacklevel=4)
    out = list(leaves)
    for i in track([i for i, spec in enumerate(plan.specs) if spec is not None], plan.who):
        x, spec = jnp.asarray(_trees.dense(leaves[i])), plan.specs[i]
        assert spec is not None
        refuse_non_finite([paths[i]], [jnp.all(jnp.isfinite(x))])
        out[i] = one(x, plan.seen[i]) if i in plan.seen else quantize(paths[i], x, spec)[0]
    return treedef.unflatten(out)
