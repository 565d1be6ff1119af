"""Drop and grow: as many connections are brought back as were dropped, leaf by leaf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, Scores
from jaxprune.masks import NM
from jaxprune.optim._keys import as_data
from jaxprune.optim._moving import Rule, Seen, moving
from jaxprune.optim._selection import Fractions, Selection, fractions_of
from jaxprune.scores import random

GrowFn = Callable[[Seen, jax.Array], Scores]
Fresh = Callable[[jax.Array, tuple[int, ...], Any], Array]


def regrowing(
    name: str,
    inner: optax.GradientTransformation,
    sparsity: Fractions,
    key: jax.Array,
    *,
    grow: GrowFn | None,
    drop: Any = 0.3,
    every: int = 1,
    begin: int = 0,
    end: int | None = None,
    select: Selection,
    fresh: Fresh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Random masks that stay, or that drop the least weights and grow others by a score.

    Args:
      name: the function that users call.
      inner: any optax transform.
      sparsity: a number, a tree, or a function of the parameters.
      key: of all random choices.
      grow: `(seen, key) -> scores` of what comes back; `None`: masks stay.
      drop: fraction of the kept weights that are dropped, or a function of the step.
      every, begin, end: masks move at multiples of `every` within `[begin, end]`.
      select: how masks are made.
      fresh: initializer of weights that are brought back; zero without.
    """
    data, remade = as_data(key)

    def start(params: Params) -> Masks:
        scores = select.restricted(random(params, jax.random.fold_in(key, 0)), params)
        select.all_kept(params, lambda *_: scores)  # checks that the pattern fits
        return select.masks(scores, fractions_of(sparsity, params))

    def memory(_: Params) -> dict[str, Any]:
        return {"key": data()}

    if grow is None:
        return moving(inner, Rule(name, start))

    def due(step: Array, _: dict[str, Any]) -> Array:
        now = (step % every == 0) & (step >= begin)
        return now if end is None else now & (step <= end)

    def move(seen: Seen) -> tuple[Masks, dict[str, Any]]:
        fraction = jnp.asarray(drop(seen.step) if callable(drop) else drop, jnp.float32)
        final = fractions_of(sparsity, seen.params)
        kept = _kept_after_drop(select, seen, final, jnp.clip(fraction, 0.0, 1.0))
        own = jax.random.fold_in(remade(seen.memory["key"]), 2 * seen.step + 1)
        score = select.restricted(grow(seen, own), seen.params)
        score = jax.tree.map(_first, score, kept)
        return select.masks(score, final), seen.memory

    def values(params: Params, memory: dict[str, Any], step: Array) -> Params:
        own = jax.random.fold_in(remade(memory["key"]), 2 * step + 2)
        assert fresh is not None
        leaves, treedef = jax.tree.flatten(params)
        drawn = [
            fresh(jax.random.fold_in(own, i), p.shape, p.dtype) if p.ndim else p
            for i, p in enumerate(leaves)
        ]
        return treedef.unflatten(drawn)

    rule = Rule(name, start, move, due, memory, holds=True, fresh=values if fresh else None)
    return moving(inner, rule)


def check_moves(drop: Any, every: int, begin: int, end: int | None) -> None:
    """Raises for steps and drop fractions that make no sense."""
    _checks.positive_int("every", every)
    _checks.positive_int("begin", begin, least=0)
    if end is not None:
        _checks.positive_int("end", end, least=0)
        if end // every * every < begin:
            raise ValueError(
                f"end: no multiple of every={every} lies in [begin, end] = [{begin}, {end}], so masks "
                "would never move; use jp.optim.static_random for masks that stay"
            )
    if not callable(drop):
        _checks.fraction("drop", drop)


def _kept_after_drop(select: Selection, seen: Seen, final: Any, drop: Array) -> Masks:
    """The masks without the kept weights of least magnitude."""
    sizes = _trees.magnitudes(seen.params)
    scores = select.restricted(sizes, seen.params)
    scores = jax.tree.map(
        lambda s, m: s if s.ndim == 0 else jnp.where(m, s, -jnp.inf), scores, seen.masks
    )
    # N:M binds what is kept in the end, not what is dropped before
    pattern = None if isinstance(select.pattern, NM) else select.pattern
    dropping = Selection(select.scope, pattern, select.uses, select.where, select.min_keep)
    is_one = not jax.tree.structure(final).num_nodes > 1
    if select.scope == "leaf" and pattern is None:
        after = jax.tree.map(
            lambda s, f: _sparser(f, drop, s.size, select.min_keep) if s.ndim else jnp.float32(0),
            scores,
            jax.tree.map(lambda _: final, scores) if is_one else final,
        )
    else:
        after = jax.tree.map(lambda f: _sparser(f, drop, 0, 0), final)
    return dropping.masks(scores, after)


def _sparser(fraction: Any, drop: Array, size: int, least: int) -> Array:
    """The sparsity after dropping, from the count that is kept where the fraction is known."""
    density = 1.0 - fraction
    if size and not _checks.is_traced(fraction):
        count = max(round((1 - float(np.asarray(fraction))) * size), min(least, size))
        density = count / size
    return jnp.float32(1.0) - jnp.float32(density) * (1.0 - drop)


def _first(score: Any, kept: Any) -> Any:
    """Grow scores, with those of kept weights above all."""
    return score if jnp.ndim(score) == 0 else jnp.where(kept, jnp.inf, score)
