"""Sums over named axes: traced where something binds the axis, else the error says how."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, axis_name="batch")(nn.Dense(8)(x))
        return nn.Dense(3)(nn.relu(x))


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 5)), jnp.float32)


def apply(variables, x):
    return Net().apply(variables, x, mutable=["batch_stats"])


def test_a_norm_over_a_named_axis_shrinks_under_vmap():
    mapped = jax.vmap(apply, in_axes=(None, 0), axis_name="batch")
    plain = Net(parent=None)
    variables = jax.vmap(
        lambda x: plain.init(jax.random.key(1), x), axis_name="batch"
    )(X)  # fmt: skip
    variables = jax.tree.map(lambda x: x[0], variables)
    fn = lambda v, x: mapped(v, x)[0]
    graph = jp.trace(fn, variables, X)
    assert [group.size for group in graph.groups] == [8]
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(variables), sparsity=0.5)
    small_fn, small = jp.compact(fn, variables, masks, X, verify=True)
    assert small["params"]["Dense_0"]["kernel"].shape == (5, 4)
    assert small_fn.differences["output"] < 1e-5


def test_an_axis_that_nothing_binds_names_the_cure():
    fn = lambda p, x: jax.lax.pmean(x @ p["w"], "batch")
    params, x = {"w": jnp.ones((5, 3))}, X[0]
    for call in (jp.trace, jp.uses, lambda *xs: jp.compressed(fn)(*xs[1:])):
        with pytest.raises(ValueError, match=r"named axis 'batch'.*axis_name='batch'"):
            call(fn, params, x)
