"""Scores of whole filters, that others can stand in for."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune._types import Params, Scores, Where
from jaxprune.scores._chosen import chosen_of, wide
from jaxprune.scores._rows import layout_of


def fpgm(params: Params, *, uses: Any = None, where: Where = None) -> Scores:
    """FPGM: the sum of a filter's distances to those of its layer, small near their geometric median.

    A filter is all weights that reach one output; each of them has its score. So
    `jp.structure.unit_masks` ranks the outputs of a layer by it: what the next layer reads them with
    scores all of them alike.

    Args:
      params: any tree of dense arrays.
      uses: of `jp.uses(fn, params, *args)`, or the graph of `jp.trace`: which leaves are weights, and
        which axes are outputs. Needed for convolutions: shapes do not tell a window from stacked layers.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative float32 scores in the weight's shape, `+inf` of a lone filter; or
      the scalar `+inf`.

    Raises:
      ValueError: a NaN, a `where` that matches nothing, or a leaf of three axes and more without `uses`.
      TypeError: compressed leaves.

    Example:
      >>> jp.scores.fpgm({"w": jnp.array([[0.0, 1.0, 5.0], [0.0, 0.0, 0.0]])})["w"].tolist()
      [[6.0, 5.0, 9.0], [6.0, 5.0, 9.0]]

    Reference: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration", 2019, https://arxiv.org/abs/1811.00250
    """
    chosen = chosen_of(params, where, uses)
    scores = []
    for path, w, use in zip(chosen.paths, chosen.leaves, chosen.uses, strict=True):
        if uses is None and use.stacked:
            raise ValueError(
                f"fpgm: leaf {path!r} of {w.shape}: a window, or a stack of layers? Pass "
                "uses=jp.uses(fn, params, *args), or the graph of jp.trace"
            )
        layout = layout_of(w.shape, use)
        if layout.sizes[1] > 1:
            distances = _distances(layout.rows(wide(w)))
        else:
            distances = jnp.full(layout.sizes[:2], jnp.inf)
        scores.append(layout.leaf(jnp.broadcast_to(distances[..., None], layout.sizes)))
    return chosen.scores("fpgm", scores)


@jax.jit
def _distances(
    rows: Float[Array, "stacks outputs inputs"],
) -> Float[Array, "stacks outputs"]:
    """The sum of each row's Euclidean distances to all rows; row by row, so that equal rows give 0."""

    def one(stack: Array) -> Array:
        norm = lambda row: jnp.sum(jnp.linalg.norm(stack - row, axis=-1))
        return jax.lax.map(norm, stack)

    return jax.lax.map(one, rows)
