"""Masks that grow with training."""

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, ScheduleFn, ScoreFn, Scores, Where
from jaxprune.masks import AnyPattern, TreePattern, from_scores, pattern_on
from jaxprune.optim._fit import check_maskable, is_empty
from jaxprune.optim._masked import masked_step, required


class GradualState(NamedTuple):
    """State of `gradual`.

    Attributes:
      step: int32 scalar, updates so far; also `.count`. A field of that name would hide the inner
        optimizer's from `optax.tree.get(state, "count")`.
      sparsity: float32 scalar, the sparsity of `masks`.
      masks: tree of bools like the parameters, in the parameter's shape where pruned.
      inner_state: state of the wrapped transform.
    """

    step: Int[Array, ""]
    sparsity: Float[Array, ""]
    masks: Masks
    inner_state: optax.OptState

    @property
    def count(self) -> Int[Array, ""]:  # ty: ignore[incompatible-property-override]
        """Updates so far."""
        return self.step


def gradual(
    inner: optax.GradientTransformation,
    schedule: ScheduleFn,
    *,
    scores: ScoreFn = _trees.magnitudes,
    scope: str = "global",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
    every: int = 1,
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Prune while training: at each change of the schedule the lowest-scoring weights become zero.

    Weights that are zero stay zero, and the inner optimizer holds nothing of them; as with
    `jp.masked_update`, nothing may follow this transform in a chain (`jp.optim.check`). Between two
    changes the masks are only read: scoring and selection run under `lax.cond`, in the same compiled
    step.

    Args:
      inner: any optax transform.
      schedule: `step -> sparsity` in [0, 1], such as `jp.schedules.cubic`. The first update is step
        0; values are clipped to [0, 1].
      scores: `params -> scores` or `(params, grads) -> scores`; magnitude by default.
      scope: `"global"` or `"leaf"`, see `jp.masks.from_scores`.
      pattern: `None`, `Block`, `Channel` or `NM`; or `jp.structure.Units` for structured pruning, after
        which `jp.compact(fn, params, jp.optim.get_masks(state), *args)` makes the model smaller.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are pruned; by default the weights: as `uses` says, else by shapes and names.
      every: look at the schedule only at every so many steps, at least 1.
      min_keep: weights that each leaf keeps at least, with `scope="leaf"`.

    Returns:
      A transform whose state is a `GradualState`.

    Raises:
      ValueError: `every` below 1, an unknown scope, `min_keep` without `scope="leaf"`, a `where` or
        pattern that does not fit the parameters (from `init`), or `params` missing (from `update`).
      TypeError: compressed leaves among those to prune (from `init`).

    Example:
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> tx = jp.optim.gradual(optax.sgd(0.0), jp.schedules.linear(0.5, end=2))
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].tolist()
      [[0.0, -2.0], [3.0, 0.0]]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878
    """
    _checks.choice("scope", scope, ("global", "leaf"))
    _checks.positive_int("every", every)
    if not callable(schedule):
        raise TypeError(
            f"schedule: expected a callable step -> sparsity, got {type(schedule).__name__}; "
            "for a constant sparsity use jp.schedules.one_shot"
        )
    inner = optax.with_extra_args_support(inner)
    needs_grads = _takes_gradients(scores)

    select = partial(from_scores, scope=scope, pattern=pattern, uses=uses, min_keep=min_keep)

    def score(params: Params, grads: Params) -> Scores:
        found = scores(params, grads) if needs_grads else scores(params)
        if where is None and uses is None and scores is not _trees.magnitudes:
            return found
        return _trees.restrict(found, params, where, uses=uses)

    def rebuilt(params: Params, grads: Params, masks: Masks, target: Array) -> Masks:
        found = jax.tree.map(
            lambda s, m: s if jnp.ndim(s) == 0 else jnp.where(m, s, -jnp.inf),
            score(params, grads),
            masks,
        )
        new = select(found, target)
        return jax.tree.map(lambda m, old: jnp.broadcast_to(m, old.shape), new, masks)

    def init(params: Params) -> GradualState:
        masks = params if is_empty(params) else unpruned(params)
        return GradualState(
            jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), masks, inner.init(params)
        )

    def unpruned(params: Params) -> Masks:
        shapes = jax.eval_shape(score, params, params)
        paths, leaves, treedef = _trees.flatten(params)
        columns = leaves, treedef.flatten_up_to(shapes), _trees.uses_of(params, uses)
        for path, leaf, s, use in zip(paths, *columns, strict=True):
            _checks.broadcasts("scores", path, s.shape, jnp.shape(leaf))
            if not isinstance(pattern, TreePattern) and s.shape:
                pattern_on(pattern, path, s.shape, use)
        if isinstance(pattern, TreePattern):
            fresh = lambda scores: select(scores, jnp.float32(0))
            masks = jax.tree.map(lambda m: jnp.ones(m.shape, bool), jax.eval_shape(fresh, shapes))
        else:
            masks = _trees.map_with_path(_all_true, params, shapes)
        check_maskable(params, masks)
        if not any(m.ndim for m in jax.tree.leaves(masks)):
            raise ValueError(
                "where: selects no leaf, so gradual would prune nothing; name the leaves, such as "
                "where='.*'. Behind optax.flatten wrap the other way: gradual(optax.flatten(inner), …)"
            )
        return masks

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, GradualState]:
        params = required(params, "gradual")
        wanted = jnp.clip(jnp.asarray(schedule(state.step), jnp.float32), 0.0, 1.0)
        due = (state.step % every == 0) & (wanted != state.sparsity)
        masks = jax.lax.cond(
            due, rebuilt, lambda p, g, masks, target: masks, params, updates, state.masks, wanted
        )
        sparsity = jnp.where(due, wanted, state.sparsity)
        new, inner_state = masked_step(inner, masks, updates, state.inner_state, params, extra)
        step = jnp.asarray(optax.safe_increment(state.step))
        return new, GradualState(step, sparsity, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


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
