"""Leaves of qwix: the same numbers there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.structure._zoo import normal

qarray = pytest.importorskip("qwix._src.core.qarray")

CASES = {
    "int8": (jnp.int8, "absmax", {"bits": 8}),
    "int4": (jnp.int4, "absmax", {"bits": 4}),
    "asymmetric": (jnp.int8, "minmax", {"bits": 8, "symmetric": False}),
    "int4_asymmetric": (jnp.int4, "minmax", {"bits": 4, "symmetric": False}),
    "nf4": ("nf4", "absmax", {"dtype": "nf4"}),
    "float8": (jnp.float8_e4m3fn, "absmax", {"dtype": "float8_e4m3fn"}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [None, 4])
def test_equal_numbers_there_and_back(name, tile):
    kind, method, settings = CASES[name]
    x = normal(8, 6)
    how = qarray.HowToQuantize(
        qtype=kind,
        channelwise_axes=[1],
        tiled_axes={0: tile} if tile else {},
        calibration_method=method,
    )
    theirs = qarray.quantize(x, how)
    ours = jp.export.from_qwix({"w": theirs})["w"]
    np.testing.assert_allclose(ours.materialize(), qarray.dequantize(theirs), rtol=1e-6)
    back = jp.export.to_qwix({"w": ours})["w"]
    np.testing.assert_array_equal(back.qvalue, theirs.qvalue)
    np.testing.assert_allclose(qarray.dequantize(back), qarray.dequantize(theirs), rtol=1e-6)
    full = "int" in name and settings.get("symmetric", True)
    spec = jp.quantize.Spec(**settings, group_size=tile, full_range=full)
    mine = jp.quantize_tree({"w": x}, rules=[("w", spec)])["w"]
    np.testing.assert_allclose(mine.scale, theirs.scale, rtol=1e-6)
    np.testing.assert_array_equal(mine.levels().astype(float), theirs.qvalue.astype(float))


def test_other_formats_are_refused():
    x = jax.random.normal(jax.random.key(0), (8, 8))
    how = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=[], tiled_axes={1: 4})
    with pytest.raises(ValueError, match="tiles of axis 1"):
        jp.export.from_qwix({"w": qarray.quantize(x, how)})
