"""What a call costs."""

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from tests.structure._zoo import build, normal


@pytest.mark.parametrize("name", ["mlp", "flatten_cnn", "residual", "depthwise"])
def test_cost_agrees_with_xla(name):
    fn, params, x = build(name)
    analysis = jax.jit(fn).lower(params, x).cost_analysis()
    assert jp.trace(fn, params, x).cost().flops == pytest.approx(analysis["flops"], rel=0.05)


def test_cost_of_an_mlp():
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    cost = jp.trace(lambda p, x: x @ p["a"] @ p["b"], params, normal(3, 4)).cost()
    assert cost.macs == 3 * (4 * 8 + 8 * 2)
    assert cost.flops == 2 * cost.macs
    assert cost.param_bytes == 4 * 48
    assert cost.activation_bytes == 4 * 3 * (8 + 2)
    assert cost.table.row_count == 2
