"""Scores: how much each weight matters, larger = more worth keeping.

A score is a plain function from parameters (and gradients) to a tree like the parameters; a leaf that
nobody prunes scores the scalar `+inf`. Your own needs no registration:

    def signed(params):
        return jax.tree.map(lambda w: w if w.ndim > 1 else jnp.inf, params)

    masks = jp.masks.from_scores(signed(params), 0.5)

Scores that look at data take a loss and a batch; `accumulate` averages any of them over batches or
examples, and `jp.masks.iterative` prunes by them in rounds.
"""

from jaxprune.scores._accumulate import accumulate, fisher_diagonal
from jaxprune.scores._activations import gram_diagonal, per_entry, wanda
from jaxprune.scores._blocks import fisher_blocks, obs
from jaxprune.scores._connection import grasp, snip
from jaxprune.scores._filters import fpgm
from jaxprune.scores._gradients import fisher, movement, taylor
from jaxprune.scores._hessian import hessian_diagonal
from jaxprune.scores._synflow import synflow
from jaxprune.scores._weights import lamp, magnitude, random

__all__ = [
    "accumulate",
    "fisher",
    "fisher_blocks",
    "fisher_diagonal",
    "fpgm",
    "gram_diagonal",
    "grasp",
    "hessian_diagonal",
    "lamp",
    "magnitude",
    "movement",
    "obs",
    "random",
    "snip",
    "synflow",
    "taylor",
    "wanda",
]
