"""Which n of m weights stay, learned by descent on the logits of all patterns."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, Where
from jaxprune.masks import NM, pattern_on
from jaxprune.optim._fit import is_empty, takes_update
from jaxprune.optim._forward import ForwardRule, forward
from jaxprune.optim._keys import as_data
from jaxprune.optim._moving import Seen
from jaxprune.optim._view import view

_MOST = 1000  # patterns of a group; each has a logit


def learned_nm(
    inner: optax.GradientTransformation,
    pattern: NM,
    *,
    key: jax.Array,
    logits: optax.GradientTransformation,
    temperature: Callable[[Array], Any] | float = 1.0,
    prior: float = 3.0,
    uses: Any = None,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Learn N:M masks: each group has a logit for each of its patterns, drawn from by Gumbel-softmax.

    In each forward pass a group's soft mask is `softmax((logits + Gumbel noise) / temperature)` over the
    `m`-choose-`n` patterns; its gradient descends the logits. `jp.optim.sparse_params(opt_state, params)`
    is such a draw: the loss in training is that of it. **The network in the end is
    `jp.apply_masks(params, jp.optim.get_masks(opt_state))`**, the likeliest pattern of each group. With
    `inner=optax.set_to_zero()` the weights of a trained network stay as they are (MaskLLM).

    Args:
      inner: any optax transform, for the weights.
      pattern: `jp.masks.NM(n, m)`, of at most 1000 patterns a group; `m` divides the axis.
      key: of all draws.
      logits: optax transform for the logits, such as `optax.adam(0.1)`.
      temperature: above 0, or a function of the step, such as one from 4 to 0.05.
      prior: logits begin at `prior` times how many weights a pattern shares with that of the largest
        magnitudes, less the mean; at least 0.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where groups lie.
      where: which leaves are masked; by default the weights.

    Returns:
      A transform whose state is a `ForwardState`; the logits, of shape (..., groups, ..., patterns) with
      the groups in place of the pattern's axis, are `state.memory["logits"]`.

    Raises:
      ValueError: a number out of range, too many patterns, a leaf whose axis `m` does not divide or a
        `where` that does not fit (from `init`), or `params` missing (from `update`).
      TypeError: a pattern that is no `NM`; compressed leaves among those selected (from `init`).

    Example:
      >>> params = {"w": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
      >>> tx = jp.optim.learned_nm(
      ...     optax.set_to_zero(), jp.masks.NM(2, 4), key=jax.random.key(0), logits=optax.adam(0.3)
      ... )
      >>> state, loss = tx.init(params), lambda p: jnp.square(jnp.sum(p["w"]) - 3)
      >>> for _ in range(60):
      ...     grads = jax.grad(loss)(jp.optim.sparse_params(state, params))
      ...     updates, state = tx.update(grads, state, params)
      >>> jp.optim.get_masks(state)["w"].ravel().tolist()
      [False, False, True, True]

    Reference: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", 2024,
    https://arxiv.org/abs/2409.17481
    """
    if not isinstance(pattern, NM):
        raise TypeError(f"pattern: expected jp.masks.NM(n, m), got {type(pattern).__name__}")
    if not callable(temperature):
        _checks.positive("temperature", temperature)
    if not prior >= 0:
        raise ValueError(f"prior: expected a number of at least 0, got {prior}")
    table = patterns_of(pattern.n, pattern.m)
    data, remade = as_data(key)

    def begun(params: Params) -> Params:
        paths, leaves, treedef = _trees.flatten(params)
        chosen, uses_ = _trees.select(params, where, uses=uses), _trees.uses_of(params, uses)
        found = [
            _begun(path, leaf, pattern_on(pattern, path, leaf.shape, use), table, prior)
            if hit
            else jnp.zeros(())
            for path, leaf, hit, use in zip(paths, leaves, chosen, uses_, strict=True)
        ]
        return treedef.unflatten(found)

    def drawn(step: Array, held: Array) -> dict[str, Any]:
        heat = jnp.asarray(temperature(step) if callable(temperature) else temperature, jnp.float32)
        seed = jax.random.bits(jax.random.fold_in(remade(held), step), (), jnp.uint32)
        return {"temperature": heat, "seed": seed}

    def memory(params: Params) -> dict[str, Any]:
        found = params if is_empty(params) else begun(params)
        held = {"logits": found, "optimizer": logits.init(found), "key": data()}
        return held | drawn(jnp.zeros((), jnp.int32), held["key"])

    def masks_of(memory: dict[str, Any], params: Params) -> Masks:
        best = lambda _, p, x: _likeliest(x, p.shape, table) if x.ndim else jnp.array(True)
        return _trees.map_with_path(best, params, memory["logits"])

    seen_by = _Drawn(pattern.n, pattern.m)

    def reach(seen: Seen) -> tuple[Params, dict[str, Any]]:
        run = lambda params, x: seen_by(params, seen.masks, seen.memory | {"logits": x})
        values, pull = jax.vjp(run, seen.params, seen.memory["logits"])
        alike = jax.tree.map(lambda g, v: g.astype(v.dtype), seen.grads, values)
        down, slopes = pull(alike)
        down = _trees.map_with_path(
            lambda _, d, g: d.astype(g.dtype) if takes_update(g) else g, down, seen.grads
        )
        step, after = logits.update(slopes, seen.memory["optimizer"], seen.memory["logits"])
        moved = optax.apply_updates(seen.memory["logits"], step)
        return down, seen.memory | {"logits": moved, "optimizer": after}

    def move(seen: Seen) -> tuple[Masks, dict[str, Any]]:
        again = drawn(seen.step, seen.memory["key"])
        return masks_of(seen.memory, seen.params), seen.memory | again

    rule = ForwardRule(
        "learned_nm",
        lambda params: masks_of(memory(params), params),
        move,
        lambda *_: jnp.array(True),
        memory,
        reach=reach,
        view=seen_by,
    )
    return forward(inner, rule)


@view
@dataclass(frozen=True)
class _Drawn:
    """Weights times soft masks drawn with the noise and temperature in memory."""

    n: int
    m: int

    def __call__(self, params: Params, masks: Masks, memory: dict[str, Any]) -> Params:
        del masks
        leaves, treedef = jax.tree.flatten(params)
        logits = treedef.flatten_up_to(memory["logits"])
        table = jnp.asarray(patterns_of(self.n, self.m), jnp.float32)
        own, found = jax.random.key(memory["seed"]), []
        for i, (p, x) in enumerate(zip(leaves, logits, strict=True)):
            if not x.ndim:
                found.append(p)
                continue
            noise = jax.random.gumbel(jax.random.fold_in(own, i), x.shape)
            soft = jax.nn.softmax((x + noise) / memory["temperature"]) @ table
            found.append(p * _spread(soft, p.shape).astype(p.dtype))
        return treedef.unflatten(found)


def patterns_of(n: int, m: int) -> Bool[np.ndarray, "patterns m"]:
    """All ways to keep `n` of `m`, in lexicographic order.

    Raises:
      ValueError: more than 1000 of them.
    """
    kept = list(combinations(range(m), n))
    if len(kept) > _MOST:
        raise ValueError(
            f"pattern: NM({n}, {m}) has {len(kept)} patterns a group, expected at most {_MOST}; take a "
            "smaller m"
        )
    table = np.zeros((len(kept), m), bool)
    for row, indices in zip(table, kept, strict=True):
        row[list(indices)] = True
    return table


def _begun(path: str, leaf: Any, pattern: NM, table: np.ndarray, prior: float) -> Array:
    """Logits of a leaf: the pattern of its largest magnitudes is the likeliest."""
    assert not isinstance(pattern.axis, str)
    axis, shape = pattern.axis % len(leaf.shape), leaf.shape
    if shape[axis] % pattern.m:
        raise ValueError(
            f"pattern: NM({pattern.n}, {pattern.m}) needs groups of {pattern.m} along axis {axis}, which "
            f"leaf {path!r} of shape {shape} does not divide into; leave it out with where="
        )
    groups = (*shape[:axis], shape[axis] // pattern.m, *shape[axis + 1 :], len(table))
    if not takes_update(leaf):
        return jnp.zeros(groups)  # the check that follows says why not
    largest = _grouped(pattern.mask(jnp.abs(leaf)), axis, pattern.m)
    shared = largest.astype(jnp.float32) @ jnp.asarray(table.T, jnp.float32)
    return prior * (shared - jnp.mean(shared, axis=-1, keepdims=True))


def _grouped(x: Array, axis: int, m: int) -> Array:
    """(..., groups m, ...) -> (..., groups, ..., m). Inverse of `_spread`."""
    split = x.reshape(*x.shape[:axis], x.shape[axis] // m, m, *x.shape[axis + 1 :])
    return jnp.moveaxis(split, axis + 1, -1)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    """(..., groups, ..., m) -> `shape`, where the one axis that differs has the groups."""
    axis = next((i for i, n in enumerate(shape) if x.shape[i] != n), 0)
    return jnp.moveaxis(x, -1, axis + 1).reshape(shape)


def _likeliest(x: Float[Array, "..."], shape: tuple[int, ...], table: np.ndarray) -> Array:
    return _spread(jnp.asarray(table)[jnp.argmax(x, axis=-1)], shape)
