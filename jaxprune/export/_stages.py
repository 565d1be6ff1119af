"""What each stage of compression leaves, in memory and on disk."""

import json
from collections.abc import Callable, Mapping

import jax
import numpy as np
from rich.table import Table

from jaxprune import _trees
from jaxprune._types import PyTree
from jaxprune.export._checkpoint import stored_arrays
from jaxprune.export._entropy import coded
from jaxprune.export._structure import encode
from jaxprune.reports import human_bytes, nbytes


def coded_bytes(tree: PyTree) -> int:
    """Bytes that `save(path, tree, entropy=True)` writes for arrays and structure, without writing them.

    Args:
      tree: any tree that `save` takes.

    Returns:
      Bytes.

    Example:
      >>> tree = {"w": jnp.zeros((64, 64))}
      >>> jp.export.coded_bytes(tree) < 400 < jp.nbytes(tree)
      True
    """
    structure, arrays = encode(tree, symbols=True)
    size = len(json.dumps(structure, separators=(",", ":")))
    return size + sum(len(coded(np.asarray(x))[1]) for x in stored_arrays(arrays).values())


def stages(
    trees: Mapping[str, PyTree], *, measure: Callable[[PyTree], float] | None = None
) -> Table:
    """One table over the stages of a compression: sizes, and what they cost in quality.

    Args:
      trees: the tree after each stage, by name, the first the dense one.
      measure: `tree -> number`, such as an accuracy; trees hold compressed leaves (`jp.compressed` takes
        them).

    Returns:
      A `rich` table: zeros, bytes in memory, bytes on disk (entropy-coded), the ratio of the first tree's
      bytes in memory to the latter, and the measure.

    Example:
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> pruned, _ = jp.prune_tree(params, 0.9)
      >>> found = {"dense": params, "pruned": pruned, "shared": jp.cluster_tree(pruned, bits=4)}
      >>> jp.export.stages(found).row_count
      3

    Reference: Han et al., "Deep Compression", 2015, https://arxiv.org/abs/1510.00149 (its tables)
    """
    table = Table(title="Stages of compression")
    columns = ["stage", "zeros", "in memory", "on disk", "smaller"]
    for column in columns + (["measure"] if measure else []):
        table.add_column(column, justify="left" if column == "stage" else "right")
    base = None
    for name, tree in trees.items():
        held, disk = nbytes(tree), coded_bytes(tree)
        base = held if base is None else base
        row = [name, _zeros(tree), human_bytes(held), human_bytes(disk), f"{base / disk:.1f}x"]
        table.add_row(*row, *([f"{measure(tree):.4f}"] if measure else []))
    return table


def _zeros(tree: PyTree) -> str:
    """The fraction of zeros among weights."""
    tree = _trees.resolve_ties(tree)
    leaves, chosen = _trees.flatten(tree)[1], _trees.select(tree)
    weights = [_trees.dense(x) for x, hit in zip(leaves, chosen, strict=True) if hit]
    size = sum(x.size for x in weights)
    zeros = sum(int(n) for n in jax.device_get([(x == 0).sum() for x in weights]))
    return f"{zeros / size:.1%}" if size else "-"
