"""Activation-aware quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.quantize import InputScaledArray
from tests.reconstruct.test_solvers import LAYOUTS


def salient(inputs):
    """Inputs of which one feature is large."""
    return jax.random.normal(jax.random.key(1), inputs).at[..., 1].mul(20)


@pytest.mark.parametrize("second_moment", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_less_error_than_to_nearest_in_every_layout(name, second_moment):
    shape, fn, inputs = LAYOUTS[name]
    w, x = jax.random.normal(jax.random.key(0), shape), salient(inputs)
    stats = jp.calibrate(fn, {"w": w}, [x], second_moment=second_moment)
    made = jp.awq({"w": w}, stats, 4, group_size=None)
    loss = lambda tree: float(jnp.linalg.norm(jp.compressed(fn)(tree, x) - fn({"w": w}, x)))
    near = loss(jp.quantize_tree({"w": w}, 4, uses=stats))
    few = {"scanned": 1.0, "grouped": 1.05, "depthwise": 1.05}  # no factors, or saturated inputs
    assert loss(made) <= few.get(name, 0.8) * near
    dense = fn({"w": made["w"].materialize()}, x)
    np.testing.assert_allclose(jp.compressed(fn)(made, x), dense, rtol=2e-3, atol=2e-3)
    assert made["w"].nbytes < 0.6 * w.nbytes


def test_factors_are_dense_where_they_do_not_help():
    w = jnp.outer(jnp.ones(16), jnp.arange(1.0, 5.0))  # every column on the grid
    x = jax.random.normal(jax.random.key(0), (32, 16))
    stats = jp.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x])
    assert type(jp.awq({"w": w}, stats, 8, group_size=None)["w"]) is jp.QuantizedArray


def test_through_scan_vmap_export_and_files(tmp_path):
    shape, fn, inputs = LAYOUTS["scanned"]
    w, x = 0.3 * jax.random.normal(jax.random.key(0), shape), salient(inputs)
    made = jp.awq({"w": w}, jp.calibrate(fn, {"w": w}, [x]), 4, group_size=8)
    assert isinstance(made["w"], InputScaledArray)
    run = jp.compressed(fn)
    wanted = fn({"w": made["w"].materialize()}, x)
    np.testing.assert_allclose(jax.jit(run)(made, x), wanted, atol=2e-3)
    np.testing.assert_allclose(made["w"][1].materialize(), made["w"].materialize()[1], atol=1e-6)
    jp.export.save(tmp_path / "tree", made)
    back = jp.export.load(tmp_path / "tree")
    np.testing.assert_array_equal(run(back, x), run(made, x))


def test_looked_up_too():
    w, x = jax.random.normal(jax.random.key(0), (8, 16)), salient((32, 16))
    fn = lambda p, x, i: (x @ p["w"].T, p["w"][i])
    stats = jp.calibrate(fn, {"w": w}, [(x, jnp.arange(3))])
    made = jp.awq({"w": w}, stats, 4, group_size=None)
    dense = {"w": made["w"].materialize()}
    found, wanted = jp.compressed(fn)(made, x, jnp.arange(3)), fn(dense, x, jnp.arange(3))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-3)


def test_bad_input():
    w, x = jnp.ones((4, 3)), jnp.ones((2, 4))
    stats = jp.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x])
    with pytest.raises(ValueError, match="steps: expected an integer of at least 1"):
        jp.awq({"w": w}, stats, 4, group_size=None, steps=0)
    with pytest.raises(ValueError, match="group_size: 128 does not divide .* 'w'"):
        jp.awq({"w": w}, stats, 4, otherwise="error")
