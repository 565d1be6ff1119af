"""How much can go, and why the rest stays."""

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import jaxprune as jp
from tests.structure._zoo import build


def test_shares_and_reasons():
    params = {"embed": jnp.ones((9, 8)), "mid": jnp.ones((8, 8)), "out": jnp.ones((8, 4))}

    def fn(p, tokens):
        h = jnp.cumsum(p["embed"][tokens] @ p["mid"], -1)
        return h @ p["out"]

    found = jp.trace(fn, params, jnp.ones((2, 3), int)).summary()
    assert found.parameters == pytest.approx((9 * 8 + 8 * 8) / (9 * 8 + 8 * 8 + 8 * 4))
    assert found.flops == pytest.approx(0.6, abs=0.15)
    texts = [reason.text for reason in found.reasons]
    assert set(texts) == {"cumsum runs along it", "looked up by index", "reaches output 0"}
    assert texts[0] == "cumsum runs along it"
    assert found.reasons[0].axes == 2
    assert "test_summary.py" in found.reasons[0].example
    assert all(reason.cure for reason in found.reasons)
    with (console := Console(width=200)).capture() as text:
        console.print(found)
    assert "of the FLOPs can go, in 1 groups" in text.get()


@pytest.mark.parametrize("name", ["transformer", "depthwise", "scanned_layers"])
def test_nearly_all_of_a_network_can_go(name):
    fn, params, x = build(name)
    found = jp.trace(fn, params, x).summary()
    assert 0.9 < found.parameters <= 1
    assert 0.9 < found.flops <= 1


def test_symbolic_sizes_have_no_flops():
    (batch,) = jax.export.symbolic_shape("batch")
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    found = jp.trace(fn, params, jax.ShapeDtypeStruct((batch, 4), jnp.float32)).summary()
    assert found.flops is None
    assert found.parameters == 1
