"""Numbers about masks in training, under names for any logger."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxprune import _checks, _trees
from jaxprune._types import Masks
from jaxprune.optim._access import get_masks, holder_of


def metrics(
    opt_state: optax.OptState, *, since: Masks | None = None, per_leaf: bool = False
) -> dict[str, Array]:
    """Scalars that say what masks do, for clu, TensorBoard, W&B or a list; also under `jit`.

    Args:
      opt_state: a state that holds that of exactly one masking transform of `jp.optim`.
      since: earlier masks, such as the first ones: adds `"masks/overlap"`, the fraction of the weights
        kept then that are kept now.
      per_leaf: adds `"masks/sparsity/<path>"` for each pruned leaf.

    Returns:
      `"masks/sparsity"` of the pruned leaves; `"masks/dead_units"`, slices along last axes that are
      fully masked; and for masks that move `"masks/moves"` so far, `"masks/last_move"` (a step; -1
      before), and `"masks/dropped"`, `"masks/regrown"` and `"masks/churn"` (regrown for each kept
      weight) of that move.

    Raises:
      ValueError: no masking transform in the state, or more than one; masks of another tree.

    Example:
      >>> params = {"w": jnp.arange(16.0).reshape(4, 4)}
      >>> tx = jp.optim.rigl(optax.sgd(0.1), 0.5, key=jax.random.key(0), every=2)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> found = jp.optim.metrics(state)
      >>> float(found["masks/sparsity"]), int(found["masks/moves"])
      (0.5, 1)
    """
    masks = get_masks(opt_state)
    paths, leaves, _ = _trees.flatten(masks)
    pruned = {path: m for path, m in zip(paths, leaves, strict=True) if jnp.ndim(m)}
    kept, size = _total(pruned.values()), max(sum(m.size for m in pruned.values()), 1)
    found = {"masks/sparsity": 1 - kept / size, "masks/dead_units": _dead(pruned.values())}
    changes = getattr(holder_of(opt_state), "changes", None)
    if changes is not None:
        found |= {
            "masks/moves": changes.moves,
            "masks/last_move": changes.last,
            "masks/dropped": changes.dropped,
            "masks/regrown": changes.regrown,
            "masks/churn": changes.regrown / jnp.maximum(kept, 1),
        }
    if since is not None:
        since = _checks.aligned("since", since, "the masks in opt_state", masks)
        both = jax.tree.map(jnp.logical_and, since, masks)
        scalar = lambda tree: [m for m in jax.tree.leaves(tree) if jnp.ndim(m)]
        found["masks/overlap"] = _total(scalar(both)) / jnp.maximum(_total(scalar(since)), 1)
    if per_leaf:
        found |= {f"masks/sparsity/{path}": 1 - jnp.mean(m) for path, m in pruned.items()}
    return found


def _total(masks: Any) -> Array:
    counts = [jnp.sum(m, dtype=jnp.int32).astype(jnp.float32) for m in masks]
    return jnp.sum(jnp.stack(counts)) if counts else jnp.zeros(())


def _dead(masks: Any) -> Array:
    dead = [jnp.sum(~jnp.any(m, axis=tuple(range(m.ndim - 1))), dtype=jnp.int32) for m in masks]
    return jnp.sum(jnp.stack(dead)) if dead else jnp.zeros((), jnp.int32)
