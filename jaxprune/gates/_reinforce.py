"""Policies that draw gates, trained by reward.

A Bernoulli policy opens gate `i` with chance `sigmoid(logits_i)`; a categorical one takes one of n.
Nothing needs a gradient through the gates: the score function tells which draws did better than expected.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _checks


def bernoulli(
    logits: Float[Array, "batch gates"], key: jax.Array, *, alpha: float = 1.0
) -> Float[Array, "batch gates"]:
    """Draws 0 or 1 for each gate, with chance `alpha sigmoid(logits) + (1 - alpha) (1 -
    sigmoid(logits))`.

    Args:
      logits: of gates.
      key: a PRNG key.
      alpha: in [0.5, 1]; below 1 keeps chances off 0 and 1 (BlockDrop bounds exploration so).

    Returns:
      0 or 1, no gradient.

    Raises:
      ValueError: alpha out of range.

    Example:
      >>> jp.gates.bernoulli(jnp.array([[20.0, -20.0]]), jax.random.key(0)).tolist()
      [[1.0, 0.0]]

    Reference: Wu et al., BlockDrop, 2018, https://arxiv.org/abs/1711.08393
    """
    if not 0.5 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0.5, 1], got {alpha}")
    chance = _chance(logits, alpha)
    return jax.random.bernoulli(key, chance).astype(logits.dtype)


def _chance(logits: Array, alpha: float) -> Array:
    p = jax.nn.sigmoid(logits)
    return p if alpha == 1 else alpha * p + (1 - alpha) * (1 - p)


def log_prob(
    logits: Float[Array, "batch gates"],
    actions: Float[Array, "batch gates"],
    *,
    kind: str = "bernoulli",
    alpha: float = 1.0,
) -> Float[Array, "batch"]:
    """The log-chance of some draws.

    Args:
      logits: of the policy.
      actions: 0 or 1 per gate; for `"categorical"` the number of the choice, (batch,).
      kind: `"bernoulli"` or `"categorical"`.
      alpha: as drawn with, see `bernoulli`.

    Returns:
      One per example.

    Raises:
      ValueError: an unknown kind, actions that do not fit.

    Example:
      >>> round(float(jp.gates.log_prob(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))[0]), 4)
      -1.3863
    """
    _checks.choice("kind", kind, ("bernoulli", "categorical"))
    logits = jnp.asarray(logits)
    if kind == "categorical":
        if jnp.shape(actions) != logits.shape[:-1]:
            raise ValueError(
                f"actions: shape {jnp.shape(actions)}, expected {logits.shape[:-1]}, one per example"
            )
        picked = jnp.asarray(actions).astype(jnp.int32)[..., None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits, -1), picked, -1)[..., 0]
    if jnp.shape(actions) != logits.shape:
        raise ValueError(f"actions: shape {jnp.shape(actions)}, the logits have {logits.shape}")
    if alpha == 1:
        each = actions * logits - jax.nn.softplus(logits)
    else:
        p = _chance(logits, alpha)
        each = jnp.log(jnp.where(actions > 0.5, p, 1 - p))
    return jnp.sum(each, tuple(range(1, logits.ndim)))


def reinforce(
    logits: Float[Array, "batch gates"],
    actions: Float[Array, "batch gates"],
    reward: Float[Array, "batch"],
    *,
    baseline: Any = 0.0,
    kind: str = "bernoulli",
    alpha: float = 1.0,
    entropy_bonus: float = 0.0,
) -> Float[Array, ""]:
    """REINFORCE: a scalar whose gradient, descended, raises the expected reward.

    `-mean_b (reward_b - baseline_b) log p(actions_b)`, minus the bonus times the policy's mean entropy.

    Args:
      logits: of the policy; gradients go here.
      actions: what was drawn.
      reward: of each draw, such as `-loss - lambda * cost`; no gradient.
      baseline: subtracted from rewards: a number, a moving average (`moving_baseline`), a learned
        value of each example, or the reward of the most likely actions (self-critical). Unbiased as
        long as it does not depend on the draw.
      kind, alpha: see `log_prob`.
      entropy_bonus: weight of the entropy.

    Returns:
      A scalar to minimise.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> logits, actions = jnp.zeros((2, 1)), jnp.array([[1.0], [0.0]])
      >>> loss = lambda logits: jp.gates.reinforce(logits, actions, jnp.array([1.0, 0.0]))
      >>> jax.grad(loss)(logits).tolist()  # towards the action that was rewarded
      [[-0.25], [0.0]]

    Reference: Williams, "Simple statistical gradient-following algorithms", 1992; Rennie et al., 2016,
    https://arxiv.org/abs/1612.00563 (self-critical)
    """
    _check_reward(reward, logits)
    advantage = jax.lax.stop_gradient(jnp.asarray(reward) - baseline)
    loss = -jnp.mean(advantage * log_prob(logits, actions, kind=kind, alpha=alpha))
    if entropy_bonus:
        loss = loss - entropy_bonus * policy_entropy(logits, kind=kind)
    return loss


def _check_reward(reward: Any, logits: Any) -> None:
    if jnp.shape(reward) != jnp.shape(logits)[:1]:
        raise ValueError(
            f"reward: shape {jnp.shape(reward)}, expected {jnp.shape(logits)[:1]}: one per example"
        )


def policy_entropy(logits: Float[Array, "batch gates"], *, kind: str = "bernoulli") -> Array:
    """The mean entropy of a policy, in nats, summed over its gates.

    Args:
      logits: of the policy.
      kind: `"bernoulli"` or `"categorical"`.

    Returns:
      A scalar.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> round(float(jp.gates.policy_entropy(jnp.zeros((1, 4)), kind="categorical")), 4)
      1.3863
    """
    _checks.choice("kind", kind, ("bernoulli", "categorical"))
    if kind == "categorical":
        log_p = jax.nn.log_softmax(logits, -1)
        return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1))
    each = jax.nn.softplus(logits) - jax.nn.sigmoid(logits) * logits
    return jnp.mean(jnp.sum(each, tuple(range(1, jnp.ndim(logits)))))


def ppo_clip_loss(
    logits: Float[Array, "batch gates"],
    actions: Float[Array, "batch gates"],
    advantage: Float[Array, "batch"],
    old_log_prob: Float[Array, "batch"],
    *,
    epsilon: float = 0.2,
    kind: str = "bernoulli",
    alpha: float = 1.0,
    entropy_bonus: float = 0.0,
) -> Float[Array, ""]:
    """PPO's clipped objective: several steps on the same draws, none too far.

    `-mean min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)` with `r = p(actions) / p_old(actions)`.

    Args:
      logits: of the policy now.
      actions: drawn by the old one.
      advantage: reward minus baseline; no gradient.
      old_log_prob: of the draws, when they were drawn.
      epsilon: how far the ratio may go, above 0.
      kind, alpha: see `log_prob`.
      entropy_bonus: weight of the entropy.

    Returns:
      A scalar to minimise.

    Raises:
      ValueError: shapes that do not fit, numbers out of range.

    Example:
      >>> logits, actions = jnp.zeros((1, 1)), jnp.ones((1, 1))
      >>> old = jp.gates.log_prob(logits, actions)
      >>> float(jp.gates.ppo_clip_loss(logits, actions, jnp.array([2.0]), old))
      -2.0

    Reference: Schulman et al., "Proximal Policy Optimization Algorithms", 2017,
    https://arxiv.org/abs/1707.06347
    """
    _checks.positive("epsilon", epsilon)
    _check_reward(advantage, logits)
    now = log_prob(logits, actions, kind=kind, alpha=alpha)
    ratio = jnp.exp(now - jax.lax.stop_gradient(old_log_prob))
    gain = jax.lax.stop_gradient(advantage)
    limited = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
    loss = -jnp.mean(jnp.minimum(ratio * gain, limited * gain))
    if entropy_bonus:
        loss = loss - entropy_bonus * policy_entropy(logits, kind=kind)
    return loss


class Baseline(NamedTuple):
    """A moving average of rewards.

    Attributes:
      value: scalar.
      count: batches seen.
    """

    value: Float[Array, ""]
    count: Float[Array, ""]


def moving_baseline(
    state: Baseline | None,
    reward: Float[Array, "batch"],
    *,
    decay: float = 0.9,
) -> Baseline:
    """A baseline that follows the mean reward, without a bias towards 0 at the start.

    Args:
      state: before, or `None` to begin.
      reward: of a batch.
      decay: in [0, 1).

    Returns:
      The state after; `.value` is the baseline for the next batch.

    Raises:
      ValueError: a decay out of range.

    Example:
      >>> state = jp.gates.moving_baseline(None, jnp.array([1.0, 3.0]))
      >>> round(float(state.value), 4)
      2.0
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
    if state is None:
        state = Baseline(jnp.zeros(()), jnp.zeros(()))
    count = state.count + 1
    # the weight of the newest batch among all that were seen
    weight = (1 - decay) / (1 - decay**count)
    return Baseline(state.value + weight * (jnp.mean(reward) - state.value), count)


def dropped_reward(
    correct: Float[Array, "batch"],
    actions: Float[Array, "batch blocks"],
    *,
    penalty: float = 5.0,
) -> Float[Array, "batch"]:
    """BlockDrop's reward: `1 - (share of blocks used)²` where the answer is right, else `-penalty`.

    Args:
      correct: 1 where the prediction is right.
      actions: 1 per block that ran.
      penalty: for a wrong answer.

    Returns:
      One reward per example.

    Example:
      >>> actions = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> jp.gates.dropped_reward(jnp.array([1.0, 0.0]), actions).tolist()
      [0.75, -5.0]

    Reference: Wu et al., BlockDrop, 2018, https://arxiv.org/abs/1711.08393
    """
    used = jnp.mean(actions, tuple(range(1, jnp.ndim(actions))))
    return jnp.where(correct > 0.5, 1 - used**2, -penalty)


def curriculum(
    actions: Float[Array, "batch blocks"], step: Any, *, every: int
) -> Float[Array, "batch blocks"]:
    """BlockDrop's curriculum: only the last blocks are up for decision, one more every so many steps.

    Args:
      actions: what the policy drew.
      step: of training; may be traced.
      every: steps per block, at least 1.

    Returns:
      The actions, with 1 for all blocks that are not yet up.

    Raises:
      ValueError: `every` below 1.

    Example:
      >>> jp.gates.curriculum(jnp.zeros((1, 3)), 10, every=10).tolist()
      [[1.0, 0.0, 0.0]]

    Reference: Wu et al., BlockDrop, 2018, https://arxiv.org/abs/1711.08393
    """
    _checks.positive_int("every", every)
    blocks = actions.shape[-1]
    decided = jnp.minimum(step // every + 1, blocks)
    return jnp.where(jnp.arange(blocks) >= blocks - decided, actions, 1.0)
