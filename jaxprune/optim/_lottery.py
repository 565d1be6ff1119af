"""Lottery tickets: prune what was trained, go back to an early step, train what is left."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxprune import _checks, _trees
from jaxprune._types import Masks, Params, ScoreFn, Where
from jaxprune.masks import AnyPattern, apply_masks
from jaxprune.optim._selection import Selection, check_weights_only, scorer

Train = Callable[[Params, Masks, int, int | None], Params]


class Ticket(NamedTuple):
    """One round of `lottery`, a tree that files hold as it is.

    Attributes:
      round: int32 scalar; 0 is the dense network.
      masks: what this round was trained under.
      rewound: the parameters at the step that rounds go back to, dense.
      params: the parameters that this round ended with.
    """

    round: Int[Array, ""]
    masks: Masks
    rewound: Params
    params: Params


def lottery(
    train: Train,
    params: Params,
    sparsity: float,
    *,
    rounds: int,
    rewind: int = 0,
    resume: Ticket | None = None,
    scores: ScoreFn = _trees.magnitudes,
    scope: str = "global",
    pattern: AnyPattern | None = None,
    uses: Any = None,
    where: Where = None,
    min_keep: int = 0,
) -> Iterator[Ticket]:
    """Find lottery tickets: train, prune, go back to step `rewind`, and again (iterative magnitude).

    Each round keeps the same fraction of what the one before kept, and the last one `1 - sparsity` of
    all. Rounds are yielded as they end: save them, and hand the last one to `resume` to go on after a
    break. With `rewind=0` weights go back to where they began; large networks need a few hundred steps.

    Args:
      train: `(params, masks, start, stop) -> params` trains from step `start` to before `stop`, or to
        the end where it is `None`, data and schedules included, and keeps pruned weights at zero:
        `jp.masked_update(tx, masks)` does.
      params: the parameters at step 0.
      sparsity: fraction to remove in the end, in (0, 1).
      rounds: of pruning, at least 1; 5 or more are customary.
      rewind: the step that rounds begin at, at least 0.
      resume: the last round of an earlier run with the same arguments.
      scores: `params -> scores`; magnitude by default.
      scope: `"global"` or `"leaf"`, see `jp.masks.from_scores`.
      pattern: see `jp.masks.from_scores`.
      uses: of `jp.uses(fn, params, *args)`: which leaves are weights, and where patterns lie.
      where: which leaves are pruned; by default the weights.
      min_keep: weights that each leaf keeps at least, with `scope="leaf"`.

    Returns:
      An iterator over `rounds + 1` tickets, the dense one first, or over what is left of them.

    Raises:
      ValueError: a number out of range, an unknown scope, scores that need gradients, a `where` or
        pattern that does not fit, a ticket of other parameters; and while it runs: `train` returns other
        parameters or brings pruned weights back.

    Example:
      >>> def train(params, masks, start, stop):
      ...     tx = jp.masked_update(optax.sgd(0.1), masks)
      ...     state = tx.init(params)
      ...     for _ in range(start, 10 if stop is None else stop):
      ...         updates, state = tx.update(params, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     return params
      >>> params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> tickets = list(jp.optim.lottery(train, params, 0.75, rounds=2, rewind=3))
      >>> [jp.sparsity(ticket.masks) for ticket in tickets]
      [0.0, 0.5, 0.75]

    Reference: Frankle & Carbin, "The Lottery Ticket Hypothesis", 2019, https://arxiv.org/abs/1803.03635;
    Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
    https://arxiv.org/abs/1912.05671
    """
    _checks.fraction("sparsity", sparsity)
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: expected a number between 0 and 1, got {sparsity}")
    _checks.positive_int("rounds", rounds)
    _checks.positive_int("rewind", rewind, least=0)
    check_weights_only("lottery", scores)
    select = Selection(scope, pattern, uses, where, min_keep)
    score = scorer(scores, select)
    whole = select.all_kept(params, score)
    if not any(m.ndim for m in jax.tree.leaves(whole)):
        raise ValueError("where: selects no leaf, so lottery would prune nothing")
    if resume is not None:
        _check_ticket(resume, params, whole, rounds)

    def pruned(ticket: Ticket, target: float) -> Masks:
        found = jax.tree.map(
            lambda s, m: s if jnp.ndim(s) == 0 else jnp.where(m, s, -jnp.inf),
            score(ticket.params, ticket.params),
            ticket.masks,
        )
        new = select.masks(found, target)
        return jax.tree.map(lambda m, full: jnp.broadcast_to(m, full.shape), new, whole)

    def run() -> Iterator[Ticket]:
        ticket = resume
        if ticket is None:
            rewound = _trained(train, params, whole, 0, rewind) if rewind else params
            last = _trained(train, rewound, whole, rewind, None)
            ticket = Ticket(jnp.int32(0), whole, rewound, last)
            yield ticket
        for i in range(int(ticket.round) + 1, rounds + 1):
            masks = pruned(ticket, 1 - (1 - sparsity) ** (i / rounds))
            start = apply_masks(ticket.rewound, masks)
            last = _trained(train, start, masks, rewind, None)
            ticket = Ticket(jnp.int32(i), masks, ticket.rewound, last)
            yield ticket

    return run()


def _trained(train: Train, params: Params, masks: Masks, start: int, stop: int | None) -> Params:
    copied = jax.tree.map(jnp.copy, params)  # what `train` donates must outlive it
    found = train(copied, masks, start, stop)
    found = _checks.aligned("what train returns", found, "params", params)
    items = zip(*_trees.flatten(found)[:2], jax.tree.leaves(masks), strict=True)
    off = {path: int(jnp.sum(~m & (x != 0))) for path, x, m in items if m.ndim}
    bad = {path: count for path, count in off.items() if count}
    if bad:
        path, count = next(iter(bad.items()))
        raise ValueError(
            f"train: brought {count} pruned weights of leaf {path!r} back; train under "
            "jp.masked_update(tx, masks), the whole optimizer inside"
        )
    return found


def _check_ticket(ticket: Ticket, params: Params, whole: Masks, rounds: int) -> None:
    for name, tree in (("resume.params", ticket.params), ("resume.masks", ticket.masks)):
        if jax.tree.structure(_checks.aligned(name, tree, "params", params)) != jax.tree.structure(
            tree
        ):
            raise ValueError(
                f"{name}: in other containers than params; resume with those of the run"
            )
    pairs = zip(*map(jax.tree.leaves, (ticket.masks, ticket.params, whole, params)), strict=True)
    for mask, trained, full, param in pairs:
        if np.shape(mask) != np.shape(full) or np.shape(trained) != np.shape(param):
            raise ValueError("resume: a ticket of other parameters, pattern or `where` than these")
    if not 0 <= int(ticket.round) <= rounds:
        raise ValueError(f"resume: of round {int(ticket.round)}, expected at most rounds={rounds}")
