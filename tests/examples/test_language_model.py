"""The example of a language model: two layouts of one network, and the short page does what it says."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STATES = {"cache": lambda out: out[1]}
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 20)


@pytest.fixture
def example(monkeypatch):
    """Loads an example by name, with the modules beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_layouts_and_caches_agree(example):
    """Stacked or not, with or without a cache; and removed equals masked, token by token."""
    decoder = example("_decoder")
    c = decoder.Config(vocabulary=20, layers=2, width=8, heads=4, kv_heads=2, head_dim=4, neurons=8)
    fn, params = decoder.unscanned(c)
    expected = jax.jit(fn)(params, TOKENS)[0]
    for layout in ("unscanned", "scanned"):
        fn, params = getattr(decoder, layout)(c)
        empty = decoder.empty_cache(c, 2, 6, scan=layout == "scanned")
        run, cache, found = jax.jit(fn), empty, []
        for i in range(6):
            logits, cache = run(params, TOKENS[:, i : i + 1], cache, jnp.int32(i))
            found.append(logits)
        np.testing.assert_allclose(jnp.concatenate(found, 1), expected, atol=1e-4)
        whole, _ = run(params, TOKENS, empty, jnp.int32(0))
        np.testing.assert_allclose(whole, expected, atol=1e-4)
        inputs = (TOKENS[:, :1], cache, jnp.int32(5))
        graph = jp.trace(fn, params, *inputs, states=STATES)
        scores = jp.scores.magnitude(params)
        masks = jp.structure.unit_masks(graph, scores, sparsity=0.5, scope="leaf")
        small_fn, small = jp.compact(fn, params, masks, *inputs, states=STATES)
        short = small_fn.small_state("cache", empty)
        assert jax.tree.leaves(short)[0].size < jax.tree.leaves(empty)[0].size
        masked = jax.jit(fn)(jp.apply_masks(params, masks), TOKENS)[0]
        for i in range(6):
            logits, short = jax.jit(small_fn)(small, TOKENS[:, i : i + 1], short, jnp.int32(i))
            np.testing.assert_allclose(logits[:, 0], masked[:, i], atol=1e-4)


def test_text(example, tmp_path):
    text = example("_text")
    ids, held, characters = text.load()
    assert len(ids) > 8 * len(held) > 200_000
    assert len(characters) == 96
    assert "function" in "".join(characters[i] for i in ids[:50_000])
    assert text.windows(held, count=5, length=64).shape == (5, 65)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit, match="too few"):
        text.load(tmp_path / "short.txt")


@pytest.mark.slow
def test_the_short_page(example, tmp_path):
    page = example("language_model")
    found, measured, (is_same, difference) = page.main(
        ["--quick", "--plot", str(tmp_path / "page.png")]
    )
    assert is_same
    assert difference < 2e-3
    state = {key[2]: point for key, point in found.items()}
    assert state["trained on"].bits[0] < 4.5 < np.log2(96)
    assert state["recovered"].bits[0] < state["cut"].bits[0]
    assert state["recovered"].params < 0.65 * state["trained"].params
    assert state["4 bits"].nbytes < 0.2 * state["recovered"].nbytes
    assert abs(state["8 bits"].bits[0] - state["recovered"].bits[0]) < 0.02
    rate, weights, cache = measured[0]["cut, 4 bits"]
    assert weights < 0.2 * measured[0]["dense"][1]
    assert cache < measured[0]["dense"][2]
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
