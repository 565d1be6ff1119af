import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp


def test_apply(params, container):
    tree = container(params)
    pruned, masks = jp.prune_tree(tree, 0.5)
    assert jax.tree.structure(pruned) == jax.tree.structure(masks) == jax.tree.structure(tree)
    by_hand = jax.tree.map(lambda p, m: p * m, tree, masks)
    jax.tree.map(np.testing.assert_array_equal, pruned, by_hand)
    again = jp.apply_masks(pruned, masks)
    jax.tree.map(np.testing.assert_array_equal, again, pruned)
    zeros = [x[x == 0] for x in map(np.asarray, jax.tree.leaves(pruned))]
    assert not any(np.signbit(z).any() for z in zeros)


def test_infinite_weights_become_zero():
    got = jp.apply_masks(
        {"w": jnp.array([jnp.inf, jnp.nan, 1.0])}, {"w": jnp.array([False, False, True])}
    )
    assert got["w"].tolist() == [0.0, 0.0, 1.0]


def test_gradient_is_masked(params):
    _, masks = jp.prune_tree(params, 0.5)
    grads = jax.grad(lambda p: sum(x.sum() for x in jax.tree.leaves(jp.apply_masks(p, masks))))(
        params
    )
    jax.tree.map(lambda g, m: np.testing.assert_array_equal(g, m * jnp.ones_like(g)), grads, masks)


def test_sparsity(params):
    assert jp.sparsity(params) == 0.0
    pruned, masks = jp.prune_tree(params, 0.75)
    assert jp.sparsity(pruned) == jp.sparsity(masks) == pytest.approx(0.75, abs=0.01)
    assert float(jax.jit(jp.sparsity)(pruned)) == pytest.approx(jp.sparsity(pruned))
    assert jp.sparsity(pruned, where="dense/bias") == 0.0
    assert jp.sparsity({"w": jnp.zeros((0, 2))}) == 0.0
    assert jp.sparsity(jp.quantize_tree(pruned)) >= jp.sparsity(pruned)
    assert jp.sparsity(jp.pack_masks(masks)) == jp.sparsity(masks)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=0, max_size=3), seed=st.integers(0, 9))
def test_packing_round_trip(shape, seed):
    mask = jnp.asarray(np.random.default_rng(seed).random(shape) > 0.5)
    packed = jp.pack_masks({"m": mask})
    lead = int(np.prod(shape[:-1])) if shape else 1
    assert packed["m"].nbytes == lead * (-(-shape[-1] // 8) if shape else 1)
    assert packed["m"].shape == mask.shape
    np.testing.assert_array_equal(jp.unpack_masks(packed)["m"], mask)


def test_packed_masks_map_over_leading_axes():
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (5, 4, 11))
    packed = jp.pack_masks(mask)
    np.testing.assert_array_equal(jax.vmap(lambda m: m.materialize())(packed), mask)
    _, rows = jax.lax.scan(lambda c, m: (c, m.materialize()), 0, packed)
    np.testing.assert_array_equal(rows, mask)
    third = jax.tree.map(lambda x: x[2], packed)
    assert third.shape == (4, 11)
    np.testing.assert_array_equal(third.materialize(), mask[2])


def test_bad_masks(params):
    _, masks = jp.prune_tree(params, 0.5)
    with pytest.raises(ValueError, match="missing 'embed'"):
        jp.apply_masks(params, {k: v for k, v in masks.items() if k != "embed"})
    with pytest.raises(ValueError, match=r"'embed'.*\(3,\)"):
        jp.apply_masks(params, {**masks, "embed": jnp.ones(3, bool)})
    with pytest.raises(TypeError, match=r"'embed'.*float32"):
        jp.apply_masks(params, {**masks, "embed": jnp.ones((7, 5))})
    with pytest.raises(TypeError, match="bool"):
        jp.pack_masks({"m": jnp.ones(3)})
    with pytest.raises(ValueError, match="'embed'"):
        jax.jit(jp.apply_masks)(params, {**masks, "embed": jnp.ones(3, bool)})


def test_prune_tree_checks_where_before_scoring(params):
    def never(_):
        raise AssertionError

    with pytest.raises(ValueError, match="nearest"):
        jp.prune_tree(params, 0.5, scores=never, where="embd")
