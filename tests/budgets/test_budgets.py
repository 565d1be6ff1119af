import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp


def total(params, budget):
    chosen = [
        (p.size, s)
        for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(budget), strict=True)
        if p.ndim >= 2
    ]
    return sum(n * s for n, s in chosen) / sum(n for n, _ in chosen)


@pytest.mark.parametrize("name", ["uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.99, 1.0])
def test_total(name, sparsity, params, container):
    tree = container(params)
    budget = getattr(jp.budgets, name)(tree, sparsity)
    assert jax.tree.structure(budget) == jax.tree.structure(tree)
    assert total(tree, budget) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= s <= 1 for s in jax.tree.leaves(budget))
    masks = jp.masks.from_scores(jp.scores.magnitude(tree), budget)
    assert jp.sparsity(masks) == pytest.approx(sparsity, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 64), min_size=2, max_size=4), min_size=1, max_size=6),
    sparsity=st.floats(0, 1),
)
def test_erk_is_proportional_where_not_dense(shapes, sparsity):
    tree = {str(i): jax.ShapeDtypeStruct(tuple(s), jnp.float32) for i, s in enumerate(shapes)}
    density = {k: 1 - s for k, s in jp.budgets.erk(tree, sparsity).items()}
    assert total(tree, jp.budgets.erk(tree, sparsity)) == pytest.approx(sparsity, abs=1e-6)
    ratio = [
        d / (sum(tree[k].shape) / np.prod(tree[k].shape))
        for k, d in density.items()
        if d < 1 - 1e-9
    ]
    assert np.allclose(ratio, ratio[:1] * len(ratio), rtol=1e-4, atol=1e-9)


def test_bad_sparsity(params):
    for make in (jp.budgets.uniform, jp.budgets.erk):
        with pytest.raises(ValueError, match="not per cent"):
            make(params, 80)
        with pytest.raises(ValueError, match="sparsity"):
            make(params, float("nan"))
