"""The leaves that a score is about, apart from the others: what losses are differentiated by."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Params, PyTree, Where
from jaxprune._uses import Uses


class Chosen(NamedTuple):
    """The leaves that `where` selects.

    Attributes:
      paths: of each.
      leaves: dense floating arrays.
      uses: of each.
      positions: among all leaves, in flatten order.
      others: all leaves of the tree.
      treedef: of the tree.
    """

    paths: list[str]
    leaves: list[Array]
    uses: list[Uses]
    positions: list[int]
    others: list[Any]
    treedef: Any

    def params(self, leaves: Sequence[Any]) -> Params:
        """The parameters, with other values for the chosen leaves."""
        return self._filled(self.others, leaves)

    def tree(self, leaves: Sequence[Any], other: Any) -> PyTree:
        """A tree like the parameters with `other` for each leaf that is not chosen."""
        return self._filled([other] * len(self.others), leaves)

    def scores(self, name: str, leaves: Sequence[Any]) -> PyTree:
        """Scores of the chosen leaves; others score `+inf`. Concrete NaNs are refused."""
        bad = _checks.flagged(self.paths, [jnp.isnan(x).any() for x in leaves])
        if bad:
            raise ValueError(
                f"{name}: NaN in the score of leaf {bad[0]!r}"
                + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
                + "; what it is computed from is NaN or overflows: look at the loss of these parameters, "
                "or compute it in float32"
            )
        return self.tree(leaves, _trees.unpruned_score())

    def _filled(self, all_leaves: Sequence[Any], leaves: Sequence[Any]) -> PyTree:
        filled = list(all_leaves)
        for position, leaf in zip(self.positions, leaves, strict=True):
            filled[position] = leaf
        return self.treedef.unflatten(filled)


def chosen_of(params: Params, where: Where, uses: Any) -> Chosen:
    """Split a tree of dense arrays.

    Raises:
      TypeError: a compressed leaf.
      ValueError: a `where` that matches nothing, uses of another tree.
    """
    _checks.all_dense("params", params, "score the weights before they are compressed")
    paths, leaves, treedef = _trees.flatten(params)
    known = _trees.uses_of(params, uses)
    positions = [i for i, hit in enumerate(_trees.select(params, where, uses=uses)) if hit]
    pick = lambda items: [items[i] for i in positions]
    own = [jnp.asarray(leaf) for leaf in pick(leaves)]
    return Chosen(pick(paths), own, pick(known), positions, leaves, treedef)


def loss_of(
    loss_fn: Callable[..., Any], chosen: Chosen, batch: Sequence[Any]
) -> Callable[[list[Array]], Array]:
    """The loss as a function of the chosen leaves; refuses one that is no floating scalar."""

    def loss(leaves: list[Array]) -> Array:
        value = loss_fn(chosen.params(leaves), *batch)
        dtype = getattr(value, "dtype", None)
        if dtype is None or jnp.shape(value) or not jnp.issubdtype(dtype, jnp.floating):
            got = f"{dtype}{list(jnp.shape(value))}" if dtype is not None else type(value).__name__
            raise ValueError(
                f"loss_fn: expected a scalar float, got {got}; return the mean over the batch, "
                "and no auxiliary values"
            )
        return value

    return loss


def gradients(loss_fn: Callable[..., Any], chosen: Chosen, batch: Sequence[Any]) -> list[jax.Array]:
    """The gradient of the loss by each chosen leaf."""
    return jax.grad(loss_of(loss_fn, chosen, batch))(chosen.leaves)


def wide(x: Array) -> Array:
    """Float32, in which products of weights and gradients neither vanish nor lose their order."""
    return x.astype(jnp.float32)
