import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from random import Random
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
        monkeypatch.setattr(jp.export._folder, "_replace", fail)
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


def test_numbers_of_64_bits_are_kept(tmp_path):
    tree = {
        "step": np.int64(2**40 + 1),
        "counts": np.array([2**53 + 1, -(2**60)]),
        "pi": np.float64(np.pi),
        "table": np.linspace(0, 1, 7),
        "int": 2**70,
        "w": jnp.ones(2),
    }
    jp.export.save(tmp_path / "x", tree)
    found = jp.export.load(tmp_path / "x")
    for name, value in tree.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))
        assert np.asarray(found[name]).dtype == np.asarray(value).dtype
    assert isinstance(found["w"], jax.Array)


def test_loading_onto_a_mesh(params, tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    P, shard = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    tree = {"w": jnp.arange(64.0).reshape(16, 4), "q": jp.quantize_tree({"k": jnp.ones((8, 8))})}
    jp.export.save(tmp_path / "x", tree)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=shard(mesh, P("x") if x.shape[0] % 8 == 0 else P())
        ),
        tree,
    )
    found = jp.export.load(tmp_path / "x", like=like)
    same(found, tree)
    assert found["w"].sharding.spec == P("x")
    assert found["q"]["k"].values.sharding.spec == P("x")
    found = jp.export.load(tmp_path / "x", sharding=shard(mesh, P()))
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(found))
    for wrong, message in (
        ({"w": like["w"]}, "like.*missing|unexpected"),
        (like | {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32)}, "like: leaf 'w'"),
    ):
        with pytest.raises(ValueError, match=message):
            jp.export.load(tmp_path / "x", like=wrong)


def three_layers(p, x):
    hidden = jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"])
    return hidden @ p["c"]


def compacted():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (4, 8), "b": (8, 6), "c": (6, 3)}
    p = {k: jax.random.normal(key, shapes[k]) for k, key in zip(shapes, keys, strict=True)}
    graph = jp.trace(three_layers, p, jnp.ones((2, 4)))
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(p), sparsity=0.4)
    return p, masks, jp.compact(three_layers, p, masks, jnp.ones((2, 4)))


def test_compact_functions_go_with_their_parameters(tmp_path):
    p, masks, pair = compacted()
    jp.export.save(tmp_path / "pair", pair)
    compact_fn, small = jp.export.load(tmp_path / "pair")
    same(small, pair[1])
    x = jax.random.normal(jax.random.key(1), (5, 4))
    with pytest.raises(TypeError, match=r"compact_fn\.of\(fn\)"):
        compact_fn(small, x)
    np.testing.assert_array_equal(compact_fn.of(three_layers)(small, x), pair[0](pair[1], x))
    np.testing.assert_allclose(
        compact_fn.of(three_layers)(small, x), three_layers(jp.apply_masks(p, masks), x), atol=1e-5
    )
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, placed = jp.export.load(tmp_path / "pair", sharding=everywhere)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(placed))
    again, like = jp.export.load(tmp_path / "pair", like=pair)
    same(like, small)
    np.testing.assert_array_equal(again.of(three_layers)(like, x), pair[0](pair[1], x))


def test_compact_functions_of_states_and_of_emptied_layers(tmp_path):
    state = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    fn = lambda s, x: x + jax.nn.relu(x @ s["kernel"][...] + s["bias"][...]) @ jnp.ones((6, 4))
    masks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), state)
    pair = jp.compact(fn, state, masks, jnp.ones((2, 4)))
    jp.export.save(tmp_path / "pair", pair)
    compact_fn, small = jp.export.load(tmp_path / "pair")
    x = jax.random.normal(jax.random.key(1), (5, 4))
    np.testing.assert_array_equal(compact_fn.of(fn)(small, x), pair[0](pair[1], x))


def test_classes_are_looked_up_in_a_list(tmp_path):
    tree = {"m": Mine(jnp.arange(3), {"x": 1})}
    jp.export.save(tmp_path / "x", tree)
    code = "import sys, jaxprune as jp; jp.export.load(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Mine, which is not at hand; register its class" in done.stderr
    with pytest.raises(TypeError, match="named tuple or a dataclass"):
        jp.export.register(int)


def resealed(text):
    return jp.export._folder._sealed(text)


def bare(text):
    """A manifest without its checksum."""
    return jp.export._folder._SEAL.sub("}", text)


def mangled(value, random):
    """A JSON value with one place of it changed: cut, replaced, renamed or put elsewhere."""
    odd = [
        None,
        -1,
        0,
        7,
        2**40,
        1.5,
        "w",
        "",
        [],
        {},
        [[]],
        {"kind": "none"},
        {"kind": "array", "index": -1},
    ]
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        if random.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mangled(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        i = random.randrange(len(value))
        rest = [*value[:i], *value[i + 1 :]]
        return (
            rest
            if random.random() < 0.2
            else [*value[:i], mangled(value[i], random), *value[i + 1 :]]
        )
    return random.choice(odd)


def refusal(folder):
    try:
        jp.export.load(folder)
    except ValueError as error:
        return str(error)
    return None


def test_malformed_folders_are_refused_in_one_voice(params, tmp_path):
    """1,700 malformed manifests: flipped bits, cuts, and changes with a checksum that is right."""
    random = Random(0)
    small = {"w": params["dense"]["kernel"], "v": [jnp.arange(3), 2.5, None]}
    trees = (
        jp.quantize_tree(small, bits=4),
        jp.cluster_tree(small, bits=2),
        {"m": jp.pack_masks({"a": params["embed"] > 0}), "o": optax.adam(0.1).init(small)},
        compacted()[-1],
    )
    for number, tree in enumerate(trees):
        folder = tmp_path / str(number)
        jp.export.save(folder, tree, entropy=True)
        file = folder / "manifest.json"
        text = file.read_text()
        data, whole = text.encode(), json.loads(bare(text))
        flipped = lambda i, data=data: data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :]
        damages = [flipped(random.randrange(len(data))) for _ in range(240)]
        damages += [data[: random.randrange(len(data))] for _ in range(40)]
        for damage in damages:
            file.write_bytes(damage)
            assert (refusal(folder) or "").startswith(f"path: {folder}")
        for _ in range(160):  # with a checksum that is right: what can be read, or one voice
            changed = mangled(whole, random)
            file.write_text(resealed(json.dumps(changed if isinstance(changed, dict) else whole)))
            assert (refusal(folder) or f"path: {folder}").startswith(f"path: {folder}")
