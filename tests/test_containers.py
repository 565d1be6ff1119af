"""Trees are compared by the paths of their leaves; containers do not matter."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import jaxprune as jp


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(5, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


X = jnp.ones((4, 5))
GRAPHDEF, STATE = nnx.split(Net(nnx.Rngs(0)))
CONTAINERS = {
    "State": STATE,
    "dict": dict(nnx.to_pure_dict(STATE)),
    "another order": OrderedDict((k, nnx.to_pure_dict(STATE)[k]) for k in ("up", "down")),
    "FrozenDict": freeze(nnx.to_pure_dict(STATE)),
}


def call(state, x):
    up, down = state["up"], state["down"]
    return jax.nn.relu(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]


@pytest.mark.parametrize("other", CONTAINERS)
@pytest.mark.parametrize("own", CONTAINERS)
def test_masks_scores_and_gradients_of_another_container(own, other):
    params, foreign = CONTAINERS[own], CONTAINERS[other]
    graph = jp.trace(call, foreign, X)
    scores = jp.scores.magnitude(foreign)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5)
    masked = jp.apply_masks(params, masks)
    assert jax.tree.structure(masked) == jax.tree.structure(params)
    by_path = dict(zip(*jp._trees.flatten(masked)[:2], strict=True))
    assert np.any(by_path["up/kernel"], 0).sum() == np.any(by_path["down/kernel"], 1).sum() == 8
    small_fn, small = jp.compact(call, params, masks, X, verify=True)
    other_small = jp.compact(call, foreign, masks, X)[1]
    np.testing.assert_array_equal(small_fn(small, X), small_fn(other_small, X))
    grads = jax.grad(lambda p: jnp.sum(call(p, X)))(foreign)
    found = jp.scores.taylor(params, grads)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    tx = jp.masked_update(optax.adam(1e-2), jp.masks.from_scores(scores, 0.5))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("container", CONTAINERS)
def test_units_in_an_nnx_optimizer(container):
    graph = jp.trace(call, CONTAINERS[container], X)
    model = Net(nnx.Rngs(0))
    pattern = jp.structure.Units(graph)
    tx = jp.optim.gradual(optax.adam(1e-2), lambda step: jnp.float32(0.5), pattern=pattern)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model)
    optimizer.update(model, grads)
    small = jp.nnx.compact(model, jp.optim.get_masks(optimizer.opt_state), X, verify=True)
    assert small.up.kernel.shape == (5, 8)


def test_paths_that_differ_are_named():
    masks = jax.tree.map(lambda _: True, CONTAINERS["dict"])
    masks["up"]["shift"] = masks["up"].pop("bias")
    with pytest.raises(ValueError, match="missing 'up/bias'; unexpected 'up/shift'"):
        jp.apply_masks(CONTAINERS["dict"], masks)
