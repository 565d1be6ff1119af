"""Experts that may be removed: routers that pass masked ones by."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxprune import _trees
from jaxprune._types import Where
from jaxprune.graph import NO_EXPERT
from jaxprune.program import (
    Executor,
    HookResult,
    Operation,
    Step,
    TraceCache,
    Tracked,
    inputs_of,
    run_operation,
    trace_program,
)


class RoutedFunction:
    """A function whose routers pass masked experts by, from `jp.structure.route_around`.

    Attributes:
      __wrapped__: the function that was given.
    """

    def __init__(self, fn: Callable[..., Any], router: Where) -> None:
        """Made by `jp.structure.route_around`."""
        self._fn, self._router = fn, router
        self._programs = TraceCache()
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__wrapped__ = fn

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        params = _trees.resolve_ties(params)
        paths, leaves, treedef = _trees.flatten(params)
        chosen = _trees.select(params, self._router)
        if not any(chosen):
            raise ValueError("router: selects no leaf; name the kernel that makes the logits")
        inputs = inputs_of(args, kwargs)
        leaves = [_trees.dense(leaf) for leaf in leaves]
        shapes = [jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in leaves]
        key = (treedef, *((s.shape, s.dtype) for s in shapes), inputs.key)
        dense = jax.tree.unflatten(treedef, shapes)
        program = self._programs.get(key, lambda: trace_program(self._fn, dense, *args, **kwargs))
        seen: set[str] = set()
        run = Executor(lambda step: _passed_by(step, seen))
        held = [
            Tracked.of(leaf, path) if hit else leaf
            for leaf, path, hit in zip(leaves, paths, chosen, strict=True)
        ]
        outs, _ = run.run(program, [*held, *inputs.arrays])
        unused = [p for p, hit in zip(paths, chosen, strict=True) if hit and p not in seen]
        if unused:
            raise ValueError(
                f"router: no matrix product of the function reads leaf {unused[0]!r}, where it could be "
                "followed; name the kernel that makes the logits of experts"
            )
        return program.out_tree.unflatten(outs)


def _passed_by(step: Step, seen: set[str]) -> HookResult:
    """A product with a router, and minus infinity for the experts that it has no weights for."""
    operation, operands, _ = step
    sides = [i for i, x in enumerate(operands) if isinstance(x, Tracked)]
    if operation.name != "dot_general" or len(sides) != 1:
        return HookResult()
    held = operands[sides[0]]
    ready = [x.materialize() if isinstance(x, Tracked) else x for x in operands]
    (logits,) = run_operation(operation, ready)
    found = without_masked(logits, _has_weights(operation, ready, sides[0], held.path))
    seen.add(held.path)
    return HookResult([found])


def _has_weights(operation: Operation, operands: list[Any], side: int, path: str) -> Array:
    """Per logit whether its expert has weights: a column of the router that is not zero throughout."""
    contract, batch = operation.params["dimension_numbers"]
    w, x = operands[side], operands[1 - side]
    used = (*contract[side], *batch[side])
    free = [i for i in range(w.ndim) if i not in used]
    if sum(w.shape[i] > 1 for i in free) != 1:
        raise ValueError(
            f"router: leaf {path!r} is read with free axes of sizes {[w.shape[i] for i in free]}, "
            "expected one axis, that of the experts"
        )
    has = jnp.any(
        w != 0, axis=tuple(contract[side])
    )  # (batch…, free…), in the order of the axes of w
    kept = [i for i in range(w.ndim) if i not in contract[side]]
    has = jnp.transpose(has, [kept.index(i) for i in (*batch[side], *free)])
    rows = x.ndim - len(contract[1 - side]) - len(batch[1 - side])
    at = len(batch[side]) + (len(free) if side == 0 else 0)
    return jnp.expand_dims(has, tuple(range(at, at + rows)))


def without_masked(logits: Array, has_weights: Bool[Array, "..."]) -> Array:
    """Logits with minus infinity for experts without weights; as they are where no expert has any."""
    from jax.ad_checkpoint import checkpoint_name

    none = checkpoint_name(~jnp.any(has_weights), NO_EXPERT)
    kept = jnp.where(none, True, has_weights)
    return jnp.where(kept, logits, jnp.array(-jnp.inf, logits.dtype))


def route_around(fn: Callable[..., Any], router: Where) -> RoutedFunction:
    """Makes a mixture of experts pass masked experts by, so that they can be removed.

    Masks set a router's column to zero, which is a logit of 0 and no removal: a softmax still gives the
    expert its share, and it may be among the largest. In the function made here an expert whose router
    column is zero throughout has a logit of minus infinity: it gets no share of a softmax, no place among
    the largest, no tokens, and no term of a load-balancing loss. A function without masked experts stays
    what it is.

        logits_e = x · w_e    where w_e has an entry that is not 0, else -inf

    Trace, mask, train and compact this function in place of `fn`: experts are units then, each with its
    router column, its bias there, and all its weights, for experts that are all computed, dispatched by
    products with one-hot slots, looked up by index, or multiplied by `jax.lax.ragged_dot`. Experts are
    chosen by their logits or by softmax or sigmoid of them; where such a share is 0 to the last digit, a
    tie with a masked expert is possible.

    Args:
      fn: `fn(params, *args)`.
      router: which leaves make the logits of experts: a pattern of their paths, see `where=`.

    Returns:
      A function of the same signature; it jits, maps and differentiates. `jax.checkpoint` inside of `fn`
      is opened; put it around the function made here.

    Raises:
      ValueError: (when called) a pattern that matches no leaf; a leaf that no product reads, or one with
        several axes of logits.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {
      ...     "router": jax.random.normal(keys[0], (4, 3)),
      ...     "up": jax.random.normal(keys[1], (3, 4, 8)),
      ...     "down": jax.random.normal(keys[2], (3, 8, 2)),
      ... }
      >>> def fn(p, x):
      ...     share = jax.nn.softmax(x @ p["router"])
      ...     h = jax.nn.relu(jnp.einsum("bi,eih->beh", x, p["up"]))
      ...     return jnp.einsum("be,beh,eho->bo", share, h, p["down"])
      >>> routed = jp.structure.route_around(fn, "router")
      >>> keep = jnp.array([True, False, True])
      >>> masks = {"router": keep[None], "up": keep[:, None, None], "down": keep[:, None, None]}
      >>> small_fn, small = jp.compact(routed, params, masks, jnp.ones((1, 4)), verify=True)
      >>> small["router"].shape, small["up"].shape
      ((4, 2), (2, 4, 8))
    """
    return RoutedFunction(fn, router)
