"""Entropy coding, checkpoints of shared leaves, and the table of stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.export import _entropy
from tests.structure._zoo import normal


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.integers(1, 40))
def test_symbols_come_back(data, repeat):
    symbols = np.frombuffer(data * repeat, np.uint8)
    assert (_entropy.decode(_entropy.encode(symbols), len(symbols)) == symbols).all()


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.97])
def test_codes_are_as_short_as_entropy_allows(zeros):
    rng = np.random.default_rng(0)
    x = np.where(rng.random(200_000) < zeros, 0, rng.integers(0, 16, 200_000)).astype(np.uint8)
    share = np.bincount(x) / len(x)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() * len(x) / 8
    assert len(_entropy.encode(x)) < 1.02 * entropy


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8", "int32", "bool", "bfloat16"])
def test_arrays_come_back(dtype):
    for shape in ((), (1,), (7, 3), (64, 64)):
        x = np.asarray(jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), dtype))
        method, data = _entropy.coded(x)
        back = _entropy.decoded(method, data, x.dtype, x.shape)
        assert (back == x).all()
        assert back.dtype == x.dtype


def shared_trees():
    w, k = normal(32, 24), normal(3, 3, 8, 16)
    return {
        "clusters": jp.cluster_tree({"w": w, "k": k}, bits=5),
        "vectors": jp.cluster_tree({"w": w}, bits=3, vector_size=2, codebooks=2),
        "codebook": jp.quantize_tree(jp.cluster_tree({"w": w}, bits=4), bits=8),
        "factors": jp.factorize_tree({"w": w, "k": k}, rank=4),
        "tucker": jp.factorize_tree({"k": k}, rank=3, method="tucker"),
        "ties": jp.tie_tree({"a": w, "b": -w, "c": w[:, ::-1]}, threshold=0.9, scale=True),
        "aligned": jp.tie_tree({"a": w, "c": w[:, ::-1]}, threshold=0.9, measure="aligned"),
        "layers": jp.tie_tree({"s": jnp.stack([w, w])}, threshold=0.9, layers="s"),
        "plain": {"w": w, "mask": w > 0, "half": w.astype(jnp.bfloat16), "n": jnp.array(3)},
        "float8": jp.quantize_tree({"w": w}, dtype="float8_e4m3fn"),
    }


@pytest.mark.parametrize("entropy", [False, True])
def test_round_trip_of_shared_leaves(tmp_path, entropy):
    tree = shared_trees()
    jp.export.save(tmp_path / "all", tree, entropy=entropy)
    back = jp.export.load(tmp_path / "all")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_equal_arrays_are_stored_once(tmp_path):
    x = normal(64, 64)
    jp.export.save(tmp_path / "one", {"a": x}, entropy=True)
    jp.export.save(tmp_path / "two", {"a": x, "b": x + 0, "c": [x]}, entropy=True)
    sizes = [jp.export.disk_bytes(tmp_path / name) for name in ("one", "two")]
    assert sizes[1] < sizes[0] + 500
    back = jp.export.load(tmp_path / "two")
    np.testing.assert_array_equal(back["c"][0], x)


def test_damaged_codes_are_noticed(tmp_path):
    folder = jp.export.save(tmp_path / "m", {"a": jnp.zeros((64, 64))}, entropy=True)
    file = folder / "arrays.bin"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(ValueError, match="damaged"):
        jp.export.load(folder)


def test_stages_shrink():
    params = {"w": normal(128, 128)}
    pruned = jp.prune_tree(params, 0.9)[0]
    shared = jp.cluster_tree(pruned, bits=4)
    trees = {"dense": params, "pruned": pruned, "shared": shared, "small": jp.quantize_tree(shared)}
    sizes = [jp.export.coded_bytes(tree) for tree in trees.values()]
    assert sizes[0] > 4 * sizes[1] > 8 * sizes[2]
    # nine tenths zeros and 15 values: 0.47 + 0.1 * 3.9 bits
    assert sizes[2] < 0.95 * 128 * 128 / 8 + 600
    table = jp.export.stages(trees, measure=lambda tree: float(jp.nbytes(tree)))
    assert table.row_count == 4
    assert len(table.columns) == 6
