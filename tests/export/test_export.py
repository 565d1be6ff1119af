import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxprune as jp


class Mine(NamedTuple):
    a: jax.Array
    b: dict


def everything(params):
    pruned, masks = jp.prune_tree(params, 0.5)
    return {
        "params": pruned,
        "masks": masks,
        "packed": jp.pack_masks(masks),
        "int4": jp.quantize_tree(params, bits=4),
        "asymmetric": jp.quantize_tree(params, bits=2, symmetric=False),
        "nf4": jp.quantize_tree(params, dtype="nf4"),
        "fp8": jp.quantize_tree(params, dtype="float8_e4m3fn"),
        "qat": jp.qat.prepare(params, 4, symmetric=False, masks=masks),
        "low": jnp.ones((2, 3), jnp.bfloat16),
        "optimizer": jp.masked_update(optax.adam(0.1), masks).init(params),
        "mine": Mine(jnp.arange(3), {"x": (1, 2.5, "three", True, None)}),
        "odd": [jnp.zeros((0, 3)), jnp.array(7), np.float32(2.0), jnp.ones((), bool), {}],
        3: "an integer key",
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert getattr(x, "dtype", type(x)) == getattr(y, "dtype", type(y))
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip(params, tmp_path):
    tree = everything(params)
    tree.pop(3)  # JAX cannot sort keys of two types
    assert jp.export.save(tmp_path / "a/b/model", tree) == tmp_path / "a/b/model"
    same(jp.export.load(tmp_path / "a/b/model"), tree)


def test_containers(params, container, tmp_path):
    tree = container(params)
    jp.export.save(tmp_path / "x", tree)
    same(jp.export.load(tmp_path / "x"), tree)
    quantized = jp.quantize_tree(tree, bits=4)
    jp.export.save(tmp_path / "q", quantized)
    same(jp.export.load(tmp_path / "q"), quantized)


def test_integer_keys(tmp_path):
    jp.export.save(tmp_path / "x", {0: jnp.ones(2), 10: jnp.zeros(3)})
    assert list(jp.export.load(tmp_path / "x")) == [0, 10]


def test_a_fresh_process_needs_no_template(params, tmp_path):
    jp.export.save(tmp_path / "x", {"q": jp.quantize_tree(params, bits=4)})
    code = (
        "import sys, jax, jaxprune as jp; t = jp.export.load(sys.argv[1]);"
        "print(float(jp.dequantize_tree(t)['q']['embed'].sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=True,
    )
    want = jp.dequantize_tree(jp.quantize_tree(params, bits=4))["embed"].sum()
    assert float(done.stdout) == pytest.approx(float(want), rel=1e-5)


def test_files_show_the_bits(tmp_path):
    """Random codes do not compress, so the folder is as large as the bits are many."""
    w = jax.random.uniform(jax.random.key(0), (512, 512), minval=-1)
    sizes = {}
    for bits in (8, 4, 2):
        jp.export.save(tmp_path / str(bits), jp.quantize_tree({"w": w}, bits=bits))
        sizes[bits] = jp.export.disk_bytes(tmp_path / str(bits))
        assert sizes[bits] < w.size * bits / 8 * 1.1 + 8000
    jp.export.save(tmp_path / "mask", {"m": w > 0})
    assert jp.export.disk_bytes(tmp_path / "mask") < w.size / 8 * 1.05 + 8000


def test_existing_paths(params, tmp_path):
    jp.export.save(tmp_path / "x", params)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        jp.export.save(tmp_path / "x", {"w": jnp.ones(2)})
    same(jp.export.load(tmp_path / "x"), params)
    jp.export.save(tmp_path / "x", {"w": jnp.ones(2)}, overwrite=True)
    same(jp.export.load(tmp_path / "x"), {"w": jnp.ones(2)})
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", ["arrays", "manifest", "rename"])
def test_nothing_half_written(params, tmp_path, monkeypatch, overwrite, step):
    if overwrite:
        jp.export.save(tmp_path / "x", params)
    stragglers = []

    def fail(*_, **__):
        raise ZeroDivisionError

    def fail_while_a_thread_writes(self, folder, _):
        def write():
            for i in range(20):
                with contextlib.suppress(OSError):
                    folder.mkdir(exist_ok=True)
                    (folder / str(i)).write_text("late")
                time.sleep(0.005)

        stragglers.append(threading.Thread(target=write))
        stragglers[0].start()
        raise ZeroDivisionError

    if step == "arrays":
        monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail_while_a_thread_writes)
    elif step == "manifest":
        monkeypatch.setattr(pathlib.Path, "write_text", fail)
    else:
        monkeypatch.setattr(jp.export._checkpoint, "_replace", fail)
    with pytest.raises(ZeroDivisionError):
        jp.export.save(tmp_path / "x", {"w": jnp.ones(2)}, overwrite=True)
    monkeypatch.undo()
    for thread in stragglers:
        thread.join()
    assert os.listdir(tmp_path) == (["x"] if overwrite else [])
    if overwrite:
        same(jp.export.load(tmp_path / "x"), params)


def test_missing_foreign_and_damaged(params, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        jp.export.load(tmp_path / "none")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "weights.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="no jaxprune checkpoint"):
        jp.export.load(tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="'other'"):
        jp.export.load(tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").write_text('{"form')
    with pytest.raises(ValueError, match="damaged"):
        jp.export.load(tmp_path / "foreign")


def test_every_truncated_or_missing_file_is_noticed(params, tmp_path):
    jp.export.save(tmp_path / "x", params)
    files = [f for f in (tmp_path / "x").rglob("*") if f.is_file() and f.stat().st_size]
    assert len(files) > 2
    for file in files:
        content = file.read_bytes()
        for damage in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
            file.unlink() if damage is None else file.write_bytes(damage)
            with pytest.raises(ValueError, match="damaged|incomplete|no jaxprune"):
                jp.export.load(tmp_path / "x")
            file.write_bytes(content)
    same(jp.export.load(tmp_path / "x"), params)


def test_what_cannot_be_loaded_back_is_refused(params, tmp_path):
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))
    for tree, name in (
        ({"a": {"state": state}}, "'a/state'"),
        ({"m": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, "Linear at 'm'"),
        ({"k": jax.random.key(0)}, "'k'.*key_data"),
        ({(1, 2): jnp.ones(2)}, "key"),
    ):
        with pytest.raises(TypeError, match=name):
            jp.export.save(tmp_path / "x", tree)
    assert os.listdir(tmp_path) == []


def test_sharded_arrays(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {"w": jax.device_put(jnp.arange(32.0).reshape(16, 2), sharding)}
    jp.export.save(tmp_path / "x", tree)
    chex.assert_trees_all_equal(jp.export.load(tmp_path / "x"), jax.device_get(tree))
