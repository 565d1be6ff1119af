"""Which weights masks are made of, and how: what all transforms with moving masks ask for."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, PyTree, ScoreFn, Scores, Where
from jaxprune.masks import AnyPattern, TreePattern, from_scores, pattern_on
from jaxprune.optim._fit import placed

Fractions = Any  # a number, a tree of them, or a function of the parameters that gives one


@dataclass(frozen=True)
class Selection:
    """From scores to masks: the arguments that the transforms share, see `jp.masks.from_scores`."""

    scope: str = "global"
    pattern: AnyPattern | None = None
    uses: Any = None
    where: Where = None
    min_keep: int = 0

    def __post_init__(self) -> None:
        _checks.choice("scope", self.scope, ("global", "leaf"))
        _checks.positive_int("min_keep", self.min_keep, least=0)

    def restricted(self, scores: Scores, params: Params) -> Scores:
        """The scores, `+inf` for leaves that are not pruned."""
        return _trees.restrict(scores, params, self.where, uses=self.uses)

    def masks(self, scores: Scores, sparsity: Any) -> Masks:
        """Masks of scores that are restricted already."""
        return from_scores(
            scores,
            sparsity,
            scope=self.scope,
            pattern=self.pattern,
            uses=self.uses,
            min_keep=self.min_keep,
        )

    def all_kept(self, params: Params, score: Callable[[Params, Params], Scores]) -> Masks:
        """Masks that keep all, of the shapes that later ones have; the pattern is checked."""
        shapes = jax.eval_shape(score, params, params)
        paths, leaves, treedef = _trees.flatten(params)
        columns = leaves, treedef.flatten_up_to(shapes), _trees.uses_of(params, self.uses)
        for path, leaf, s, use in zip(paths, *columns, strict=True):
            _checks.broadcasts("scores", path, s.shape, jnp.shape(leaf))
            if not isinstance(self.pattern, TreePattern) and s.shape:
                pattern_on(self.pattern, path, s.shape, use)
        if isinstance(self.pattern, TreePattern):
            found = jax.eval_shape(lambda s: self.masks(s, jnp.float32(0)), shapes)
            if not any(m.ndim for m in jax.tree.leaves(found)):
                reasons = getattr(self.pattern, "reasons", "")
                raise ValueError(f"pattern: no unit of this function can go: {reasons}")
            return jax.tree.map(lambda m: jnp.ones(m.shape, bool), found)
        return _trees.map_with_path(_all_true, params, shapes)


def fractions_of(sparsity: Fractions, params: Params) -> Any:
    """A sparsity as a number or as a tree like the parameters.

    Raises:
      ValueError, TypeError: a fraction out of range.
    """
    found = sparsity(params) if _trees.is_function(sparsity) else sparsity
    if isinstance(found, (int, float, np.number, np.ndarray, jax.Array)):
        _checks.fraction("sparsity", found)
        return found
    return placed(found, params)


def scorer(scores: ScoreFn, selection: Selection) -> Callable[[Params, Params], Scores]:
    """`(params, grads) -> scores` of the leaves to prune, from a score with or without gradients."""
    needs_grads = _takes_gradients(scores)

    def score(params: Params, grads: Params) -> Scores:
        found = scores(params, grads) if needs_grads else scores(params)
        plain = selection.where is None and selection.uses is None
        if plain and scores is not _trees.magnitudes:
            return found
        return selection.restricted(found, params)

    return score


def check_weights_only(name: str, scores: ScoreFn) -> None:
    """Raises `ValueError` for scores that need gradients, where a transform has none of all weights."""
    if _takes_gradients(scores):
        raise ValueError(
            f"scores: {name} scores weights before there are gradients of all of them; expected a "
            "function of the parameters alone, such as jp.scores.magnitude"
        )


def wanted(schedule: Callable[[Array], Any], step: Array) -> PyTree:
    """The sparsity of a step, clipped to [0, 1]: a float32 scalar, or a tree of them."""
    clip = lambda s: jnp.clip(jnp.asarray(s, jnp.float32), 0.0, 1.0)
    return jax.tree.map(clip, schedule(step))


def as_schedule(schedule: Any, name: str = "schedule") -> Callable[[Array], Any]:
    """A checked schedule; a number is a constant one.

    Raises:
      TypeError: neither a number nor a function of the step.
    """
    if isinstance(schedule, (int, float, np.number)) and not isinstance(schedule, bool):
        _checks.fraction(name, schedule)
        return lambda _: schedule
    if not callable(schedule):
        raise TypeError(
            f"{name}: expected a callable step -> sparsity, got {type(schedule).__name__}"
        )
    return schedule


def check_rising(schedule: Callable[[Array], Any]) -> None:
    """Raises `ValueError` for a schedule that goes down somewhere, as far as a sample of steps shows."""
    steps = np.unique(np.concatenate([np.arange(64), np.geomspace(64, 1e6, 192).astype(int)]))
    try:
        values = jax.vmap(lambda step: wanted(schedule, step))(jnp.asarray(steps, jnp.int32))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return  # init says what a schedule that cannot be traced is
    for found in jax.tree.leaves(values):
        if _checks.is_traced(found) or not np.ndim(found):
            continue
        falls = np.flatnonzero(np.diff(np.asarray(found)) < -1e-6)
        if falls.size:
            at = falls[0]
            raise ValueError(
                f"schedule: falls from {float(found[at]):g} at step {steps[at]} to "
                f"{float(found[at + 1]):g} at step {steps[at + 1]}, but weights that gradual made zero "
                "do not come back; use jp.optim.rigl, jp.optim.straight_through or jp.optim.ac_dc"
            )


def _all_true(_: str, param: Any, score: jax.ShapeDtypeStruct) -> Array:
    if score.shape != jnp.shape(param):
        return jnp.ones(score.shape, bool)
    dense = _trees.dense(param)
    return (dense == dense) | True  # from the parameter, so that it is sharded like it


def _takes_gradients(scores: ScoreFn) -> bool:
    """Whether a score function has a second positional parameter without default."""
    try:
        parameters = inspect.signature(scores).parameters.values()
    except (TypeError, ValueError):  # a builtin or a C function: take it as `params -> scores`
        return False
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(positional) >= 2
