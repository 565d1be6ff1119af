"""Models in folders: what `load_model` runs equals what `save_model` was given."""

import shutil
import subprocess
import sys
import warnings
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp

KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {
    "embed": jax.random.normal(KEYS[0], (32, 16)),
    "up": jax.random.normal(KEYS[1], (16, 64)) / 4,
    "down": jax.random.normal(KEYS[2], (64, 16)) / 8,
}
TOKENS = jnp.ones((2, 3), jnp.int32)
CACHE = {"sum": jnp.zeros((2, 64)), "seen": [jnp.zeros((2, 5, 16))]}
SIZES = {"tokens": "b, t", "cache": {"sum": "b, _", "seen": "b, s, ..."}}
Result = namedtuple("Result", ["logits", "cache"])


def step(params, tokens, cache, train=False):
    """A network with two states, one of which grows."""
    x = params["embed"][tokens]
    seen = jnp.concatenate([cache["seen"][0], x], 1)
    x = x + jax.nn.softmax(x @ seen.mT) @ seen
    h = jax.nn.relu(x @ params["up"])
    total = cache["sum"] + h.sum(1)
    out = (h + total[:, None]) @ params["down"] @ params["embed"].T
    return Result(-out if train else out, {"sum": total, "seen": [seen]})


def inputs(batch, length, seen):
    keys = jax.random.split(jax.random.key(batch), 3)
    cache = {
        "sum": jax.random.normal(keys[0], (batch, 64)),
        "seen": [jax.random.normal(keys[1], (batch, seen, 16))],
    }
    return jax.random.randint(keys[2], (batch, length), 0, 32), cache


def close(a, b, tolerance=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A compressed model, whose folder tests copy."""
    path = tmp_path_factory.mktemp("models") / "model"
    tree = jp.quantize_tree(PARAMS, bits=4, group_size=8)
    jp.export.save_model(path, jp.compressed(step), tree, TOKENS, CACHE, symbolic=SIZES)
    return path


@pytest.mark.parametrize("kind", ["dense", "compact int8"])
def test_any_batch_and_length(kind, tmp_path):
    fn, params, cut = step, PARAMS, lambda cache: cache
    if kind == "compact int8":
        states = {"cache": lambda out: out.cache}
        keep = jnp.arange(64) % 2 == 0
        masks = {"embed": jnp.array(True), "up": keep[None], "down": keep[:, None]}
        small_fn, params = jp.compact(step, PARAMS, masks, TOKENS, CACHE, states=states)
        cut = lambda cache: small_fn.small_state("cache", cache)
        fn, params = jp.compressed(small_fn), jp.quantize_tree(params)
        assert params["up"].shape == (16, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = cut(CACHE)
        jp.export.save_model(
            tmp_path / "m", fn, params, TOKENS, cache, symbolic=SIZES, platforms=["cpu"]
        )
        model = jp.export.load_model(tmp_path / "m")
        for sizes in ((1, 1, 9), (4, 7, 2)):
            tokens, cache = inputs(*sizes)
            cache = cut(cache)
            expected = jax.jit(fn)(params, tokens, cache)
            found = model(tokens, cache=cache)
            assert found._fields == expected._fields
            if kind == "dense":
                close(found, expected)
                continue
            # other lowerings where rows are symbolic: each of two products within 5e-4 of its rms
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                assert jnp.max(jnp.abs(x - y)) <= 1e-3 * jnp.sqrt(jnp.mean(jnp.square(y)))


FRESH = """
import sys
import numpy as np
import jaxprune as jp
model = jp.export.load_model(sys.argv[1])
cache = {"sum": np.zeros((3, 64), np.float32), "seen": [np.zeros((3, 2, 16), np.float32)]}
out = model(np.full((3, 4), 7), cache)
assert not [name for name in sys.modules if name.split(".")[0] in ("flax", "optax", "tests")]
assert isinstance(model.params["up"], jp.QuantizedArray)
np.save(sys.argv[2], out.logits)
"""


def test_a_fresh_process_has_neither_code_nor_flax(folder, tmp_path):
    """From another folder, in a process that knows of no test."""
    run = [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "out.npy")]
    subprocess.run(run, check=True, cwd=tmp_path)
    tree = jp.quantize_tree(PARAMS, bits=4, group_size=8)
    cache = {"sum": jnp.zeros((3, 64)), "seen": [jnp.zeros((3, 2, 16))]}
    expected = jax.jit(jp.compressed(step))(tree, jnp.full((3, 4), 7), cache).logits
    close(np.load(tmp_path / "out.npy"), expected)


def test_weights_are_no_constants(folder, tmp_path):
    wide = {"w": jnp.ones((600, 600))}
    fn = lambda params, x: x @ params["w"]
    jp.export.save_model(tmp_path / "m", fn, wide, jnp.ones((1, 600)), platforms=["cpu"])
    assert max(f.stat().st_size for f in (tmp_path / "m").glob("program-*")) < 1e5
    other = jp.quantize_tree(jax.tree.map(lambda x: -x, PARAMS), bits=4, group_size=8)
    model = jp.export.load_model(folder)
    tokens, cache = inputs(2, 2, 2)
    close(model.apply(other, tokens, cache), jax.jit(jp.compressed(step))(other, tokens, cache))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.linear(x))


def test_nnx_modules_with_random_numbers(tmp_path):
    """`nnx.State` with a typed key; it comes back as a dict, and states go in either way."""
    graphdef, state = nnx.split(Layer(nnx.Rngs(3)))
    fn = lambda state, x: nnx.merge(graphdef, state)(x)
    x = jax.random.normal(KEYS[3], (5, 8))
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 8"), jnp.float32)
    jp.export.save_model(tmp_path / "m", fn, state, shape, platforms=["cpu"])
    model = jp.export.load_model(tmp_path / "m")
    assert type(model.params) is dict
    close(model(x), fn(state, x))
    close(model.apply(state, x), fn(state, x))


def test_kinds_of_arguments(tmp_path):
    """Weak floats, fixed values, absent ones, bf16, keywords, compressed leaves among them."""

    def fn(params, x, scale, mode, extra=None, *, table, shift):
        y = x * scale if mode == "times" else x + scale
        return {"y": y + shift, "none": extra, "rows": (table.materialize(), [params])}

    table = jp.quantize_tree({"w": jnp.ones((4, 8))}, bits=4)["w"]
    x = jnp.ones(3, jnp.bfloat16)
    args = (x, 2.0, "times", None)
    jp.export.save_model(tmp_path / "m", fn, x, *args, table=table, shift=x)
    model = jp.export.load_model(tmp_path / "m")
    found = model(x, 3, "times", None, table=table, shift=x)
    close(found, fn(x, x, 3.0, "times", table=table, shift=x))
    assert found["y"].dtype == jnp.bfloat16
    assert found["none"] is None
    other = jp.quantize_tree({"w": jnp.ones((4, 8))}, bits=2)["w"]
    with pytest.raises(ValueError, match="table: expected a QuantizedArray, got .* static"):
        model(*args, table=other, shift=x)
    with pytest.raises(ValueError, match="scale: expected float32\\[\\], got 'a'"):
        model(x, "a", "times", table=table, shift=x)


def test_runs_in_loops_and_donates_nothing(folder):
    model = jp.export.load_model(folder)
    tokens, cache = inputs(2, 1, 4)

    @jax.jit
    def total(tree, tokens, cache):
        body = lambda s, t: (s + model.apply(tree, t[:, None], cache).logits.sum(), None)
        return jax.lax.scan(body, 0.0, jnp.stack([tokens[:, 0]] * 3))[0]

    once = model(tokens, cache).logits.sum()
    np.testing.assert_allclose(total(model.params, tokens, cache), 3 * once, rtol=1e-4)
    assert not any(x.is_deleted() for x in jax.tree.leaves((model.params, cache)))


BAD_CALLS = {
    "cache: missing; the model was saved with tokens, cache": lambda m, t, c: m(t),
    "cache: missing 'cache/sum'": lambda m, t, c: m(t, {"seen": c["seen"]}),
    r"cache/seen/0: expected float32\[b, s, 16\], got float32\[2, 4, 15\]": lambda m, t, c: m(
        t, {**c, "seen": [c["seen"][0][..., :15]]}
    ),
    r"cache/seen/0: expected .* with b = 1 as in tokens, got float32\[2, 4, 16\]": lambda m, t, c: (
        m(t[:1], c)
    ),
    r"tokens: expected int32\[b, t\], got float32.*astype\('int32'\)": lambda m, t, c: m(
        t.astype(float), c
    ),
    "tokens: given twice": lambda m, t, c: m(t, c, tokens=t),
    "mask: no argument": lambda m, t, c: m(t, c, mask=t),
    "at most 2 positional": lambda m, t, c: m(t, c, t),
    "sizes that the model was not saved for.*>= 1": lambda m, t, c: m(
        t[:0], jax.tree.map(lambda x: x[:0], c)
    ),
    "params: expected a tree with the structure of saved params, missing 'down'": (
        lambda m, t, c: m.apply({k: m.params[k] for k in ("embed", "up")}, t, c)
    ),
    "params: leaf 'down' is an array, expected a QuantizedArray": lambda m, t, c: m.apply(
        PARAMS, t, c
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_arguments_that_do_not_fit(message, folder):
    model = jp.export.load_model(folder)
    with pytest.raises((ValueError, TypeError), match=message):
        BAD_CALLS[message](model, *inputs(2, 3, 4))


def test_damaged_folders_are_refused(folder, tmp_path):
    """Every file: cut, with one byte changed, missing; folders of others."""
    files = [f.relative_to(folder) for f in folder.rglob("*") if f.is_file()]
    assert len(files) > 6
    for name in files:
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damage in (content[:middle], changed, None):
            path = tmp_path / "copy"
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(folder, path)
            if damage is None:
                (path / name).unlink()
            else:
                (path / name).write_bytes(damage)
            with pytest.raises(ValueError, match="^path: .*(damaged|incomplete|no jaxprune model)"):
                jp.export.load_model(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        jp.export.load_model(tmp_path / "none")
    jp.export.save(tmp_path / "tree", PARAMS)
    with pytest.raises(ValueError, match=r"no jaxprune model.*jp\.export\.load$"):
        jp.export.load_model(tmp_path / "tree")
    with pytest.raises(ValueError, match=r"no jaxprune checkpoint.*jp\.export\.load_model$"):
        jp.export.load(folder)


def test_platforms(tmp_path):
    """Those that do not lower are told; those that are missing are an error."""
    x = jnp.eye(4)
    schur = lambda params, x: jax.scipy.linalg.schur(x * params)[0]  # of the CPU alone
    with pytest.warns(UserWarning, match="not lowered for cuda: .*; the model runs on cpu"):
        jp.export.save_model(tmp_path / "schur", schur, jnp.ones(()), x)
    model = jp.export.load_model(tmp_path / "schur")
    assert model.platforms == ("cpu",)
    close(model(x), x)
    with pytest.raises(ValueError, match="platforms: not lowered for tpu"):
        jp.export.save_model(tmp_path / "b", schur, jnp.ones(()), x, platforms=["cpu", "tpu"])
    double = lambda params, x: params * x
    jp.export.save_model(tmp_path / "tpu", double, jnp.ones(()), x, platforms=["tpu"])
    with pytest.raises(ValueError, match="has programs for tpu, and this process runs on cpu"):
        jp.export.load_model(tmp_path / "tpu")
    with pytest.raises(ValueError, match="platforms: expected one of 'cpu', 'cuda'"):
        jp.export.save_model(tmp_path / "c", double, jnp.ones(()), x, platforms=["metal"])
    with pytest.raises(ValueError, match="platforms: expected a sequence"):
        jp.export.save_model(tmp_path / "c", double, jnp.ones(()), x, platforms="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["schur", "tpu"]


def test_compressed_functions_are_lowered_for_each_platform(folder):
    """On CPU products of few rows go over blocks; elsewhere codes become floats in one go."""
    assert jp.export.load_model(folder).platforms == ("cpu", "cuda", "tpu")
    programs = [(folder / f"program-{name}.bin").read_bytes() for name in ("cpu", "cuda", "tpu")]
    assert len(programs[0]) != len(programs[1])
    texts = {
        name: jax.export.deserialize(bytearray(program)).mlir_module()
        for name, program in zip(("cpu", "cuda"), programs, strict=False)
    }
    assert texts["cpu"].count("while") > texts["cuda"].count("while")


def test_requests_that_cannot_be(tmp_path):
    save, fn = jp.export.save_model, lambda params, x: x * params["w"]
    params, x, path = {"w": jnp.ones(4)}, jnp.ones((3, 4)), tmp_path / "m"
    bad = {
        "symbolic: 'y' is no argument": {"symbolic": {"y": "b, _"}},
        "symbolic: 'b, _, _' does not fit 'x'": {"symbolic": {"x": "b, _, _"}},
        "symbolic: 'x/a' is no array": {"symbolic": {"x": {"a": "b"}}},
        "symbolic: 'x' is 3, expected a string": {"symbolic": {"x": 3}},
        "fn: it lowers for no platform .*comparison": {"symbolic": {0: "b, t"}},
    }
    for message, how in bad.items():
        with pytest.raises(ValueError, match=message):
            save(path, lambda p, x: fn(p, x) if x.shape[0] > 1 else x, params, x, **how)
    with pytest.raises(TypeError, match="leaf 'w' is a str"):
        save(path, fn, {"w": "text"}, x)
    with pytest.raises(TypeError, match="leaf 'w' has a shape and no values"):
        save(path, fn, {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}, x)
    assert list(tmp_path.iterdir()) == []
    save(path, fn, params, x, platforms=["cpu"], symbolic={0: "b, 4"}, constraints=["b >= 2"])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(path, fn, params, x)
    save(path, fn, params, x, platforms=["cpu"], overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
