"""The optimal brain surgeon with a Fisher information in blocks: weights that stand in for each other."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks
from jaxprune._types import Params, PyTree, Scores, Where
from jaxprune.scores._accumulate import mean_of_examples, mean_over
from jaxprune.scores._chosen import chosen_of, gradients, wide
from jaxprune.scores._rows import Layout, layout_of

_TINY = 1e-30


def fisher_blocks(
    loss_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    block_size: int = 64,
    microbatch: int = 8,
    uses: Any = None,
    where: Where = None,
) -> PyTree:
    """Estimate diagonal blocks of the empirical Fisher information: means of `g g^T` over examples.

    A block holds up to `block_size` weights of one output, next to each other along its inputs; the last
    of an output is padded with zeros. A leaf takes `block_size` times its own memory.

    Args:
      loss_fn: `loss_fn(params, *batch)`, a scalar; sees one example at a time, as a batch of one.
      params: any tree of dense arrays.
      batches: tuples, each what follows `params`; a lone array counts as a one-tuple.
      block_size: weights in a block, at most; 1 is `fisher_diagonal`.
      microbatch: examples at a time.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and which axes are outputs.
      where: which leaves; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: float32 (blocks, size, size), symmetric and positive semidefinite; the scalar 0
      for other leaves. For `jp.scores.obs`.

    Raises:
      ValueError: no batches, a loss that is no scalar, a `where` that matches nothing.
      TypeError: compressed leaves.

    Example:
      >>> loss = lambda p, x: jnp.mean(x @ p["w"])
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0], [-1.0, 0.0]])
      >>> jp.scores.fisher_blocks(loss, params, [x])["w"].tolist()
      [[[1.0, 1.0], [1.0, 2.0]]]

    Reference: Singh and Alistarh, "WoodFisher: Efficient Second-Order Approximation for Neural Network
    Compression", 2020, https://arxiv.org/abs/2004.14340
    """
    _checks.positive_int("block_size", block_size)
    _checks.positive_int("microbatch", microbatch)
    chosen = chosen_of(params, where, uses)
    layouts = [layout_of(w.shape, use) for w, use in zip(chosen.leaves, chosen.uses, strict=True)]

    def in_blocks(p: Params, *example: Any) -> list[Array]:
        found = gradients(loss_fn, chosen_of(p, where, uses), example)
        pairs = zip(found, layouts, strict=True)
        return [to_blocks(g, layout, block_size) for g, layout in pairs]

    run = jax.jit(partial(mean_of_examples, in_blocks, microbatch=microbatch, reduce=_outer))
    return chosen.tree(mean_over(run, params, batches), jnp.zeros(()))


def obs(
    params: Params,
    blocks: PyTree,
    *,
    damping: float = 0.01,
    uses: Any = None,
    where: Where = None,
) -> Scores:
    """`w^2 / (2 [F^-1]_ii)`: how much the loss rises, to second order, if the others may make up for it.

    The statistic of the optimal brain surgeon, with `F` in blocks: the rest of a weight's block moves to
    where it helps most. With blocks of 1 it is `jp.scores.fisher`.

    Args:
      params: any tree of dense arrays.
      blocks: of `jp.scores.fisher_blocks`, with the same `uses` and `where`.
      damping: added to the diagonal, as a fraction of its mean over those weights of the leaf that have
        gradients. Positive: with fewer examples than weights in a block, `F` has no inverse.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights.
      where: which leaves are scored; by default the weights, see `jp.quantize_tree`.

    Returns:
      Tree like `params`: non-negative float32 scores in the weight's shape, or the scalar `+inf`.

    Raises:
      ValueError: a damping that is not positive, blocks of other parameters, a NaN, or a `where` that
        matches nothing.
      TypeError: compressed leaves.

    Example:
      >>> params = {"w": jnp.ones((2, 1))}
      >>> twins = {"w": jnp.array([[[2.0, 1.9], [1.9, 2.0]]])}  # either makes up for the other
      >>> round(float(jp.scores.obs(params, twins, damping=1e-6)["w"][0, 0]), 2)
      0.1

    References: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
    1992; Kuznedelev et al., "CAP: Correlation-Aware Pruning for Highly-Accurate Sparse Vision Models",
    2023, https://arxiv.org/abs/2210.09223
    """
    _checks.positive("damping", damping)
    chosen = chosen_of(params, where, uses)
    blocks = _checks.aligned("blocks", blocks, "params", params)
    all_blocks = chosen.treedef.flatten_up_to(blocks)
    scores = []
    for i, path, w, use in zip(
        chosen.positions, chosen.paths, chosen.leaves, chosen.uses, strict=True
    ):
        layout, block = layout_of(w.shape, use), jnp.asarray(all_blocks[i])
        size = block.shape[-1] if block.ndim == 3 else 1
        wanted = jax.eval_shape(lambda w, ly=layout, n=size: to_blocks(w, ly, n), w).shape
        if block.shape != (*wanted, wanted[-1]):
            raise ValueError(
                f"blocks: leaf {path!r} of {w.shape} has blocks of {block.shape}; expected those of "
                "jp.scores.fisher_blocks with the same uses= and where="
            )
        diagonal = from_blocks(1.0 / inverse_diagonal(block, damping), layout)
        scores.append(0.5 * jnp.square(wide(w)) * diagonal)
    return chosen.scores("obs", scores)


def to_blocks(w: Array, layout: Layout, size: int) -> Float[Array, "blocks size"]:
    """A leaf as blocks of weights of one output. Inverse: `from_blocks`."""
    rows = layout.rows(w).reshape(-1, layout.sizes[-1])
    size = min(size, max(rows.shape[1], 1))
    return jnp.pad(rows, [(0, 0), (0, -rows.shape[1] % size)]).reshape(-1, size)


def from_blocks(blocks: Float[Array, "blocks size"], layout: Layout) -> Array:
    """The leaf again. Inverse: `to_blocks`."""
    stacks, outputs, inputs = layout.sizes
    size = blocks.shape[1]
    rows = blocks.reshape(stacks * outputs, -(-inputs // size) * size)[:, :inputs]
    return layout.leaf(rows.reshape(layout.sizes))


@jax.jit
def inverse_diagonal(
    blocks: Float[Array, "blocks size size"], damping: Any
) -> Float[Array, "blocks size"]:
    """The diagonals of the inverses of damped blocks, by their Cholesky factors."""
    size = blocks.shape[-1]
    diagonals = jnp.diagonal(blocks, axis1=-2, axis2=-1)
    # padding has no curvature of its own: it counts as nothing in the mean
    count = jnp.maximum(jnp.sum(diagonals > 0), 1)
    mean = jnp.maximum(jnp.sum(diagonals) / count, _TINY)
    eye = jnp.eye(size, dtype=jnp.float32)
    # in units of the mean, so that small gradients do not vanish in the factors
    factors = jnp.linalg.cholesky(wide(blocks) / mean + damping * eye)
    inverse = jax.lax.linalg.triangular_solve(
        factors, jnp.broadcast_to(eye, factors.shape), left_side=True, lower=True
    )
    return jnp.sum(jnp.square(inverse), -2) / mean


def _outer(g: Float[Array, "examples blocks size"]) -> Float[Array, "blocks size size"]:
    return jnp.einsum("nki,nkj->kij", g, g, precision=jax.lax.Precision.HIGHEST)
