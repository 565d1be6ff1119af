import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.masks import NM, Block, Channel


def random(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 3)])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_nm_keeps_the_largest_of_every_group(n, m, axis):
    scores = random(24, 48, 24)
    mask = jp.masks.from_scores({"w": scores}, None or 1 - n / m, pattern=NM(n, m, axis))["w"]
    groups = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, m)
    values = np.moveaxis(np.asarray(scores), axis, -1).reshape(-1, m)
    assert (groups.sum(1) == n).all()
    for group, value in zip(groups, values, strict=True):
        assert set(np.flatnonzero(group)) == set(np.argsort(-value, kind="stable")[:n])


def test_nm_ties_go_to_the_first():
    mask = jp.masks.from_scores({"w": jnp.ones((8, 2))}, 0.5, pattern=NM(2, 4))["w"]
    assert mask[:, 0].tolist() == [True, True, False, False] * 2


@pytest.mark.parametrize("size", [1, 3, 6, 9])
def test_nm_ragged(size):
    scores = random(size, 5)
    mask = jp.masks.from_scores({"w": scores}, 0.5, pattern=NM(2, 4))["w"]
    assert mask.shape == scores.shape
    for start in range(0, size, 4):
        part = mask[start : start + 4]
        assert (part.sum(0) == min(2, part.shape[0])).all()


def test_nm_below_its_sparsity_keeps_more_by_score():
    scores = {"w": random(32, 16)}
    full = jp.masks.from_scores(scores, 0.5, pattern=NM(2, 4))["w"]
    half = jp.masks.from_scores(scores, 0.25, pattern=NM(2, 4))["w"]
    assert jp.sparsity({"w": half}) == 0.25
    assert bool(jnp.all(half | ~full))
    extra, left = scores["w"][half & ~full], scores["w"][~half]
    assert extra.min() >= left.max()
    traced = jax.jit(lambda s: jp.masks.from_scores(scores, s, pattern=NM(2, 4))["w"])
    np.testing.assert_array_equal(traced(0.5), full)
    np.testing.assert_array_equal(traced(0.25), half)
    np.testing.assert_array_equal(traced(0.9), full)


@pytest.mark.parametrize("shape", [(8, 8), (9, 7), (1, 1), (3, 5, 8, 6)])
@pytest.mark.parametrize("block", [(2, 2), (4, 1), (3, 5)])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_blocks(shape, block, scope):
    scores = jnp.abs(random(*shape))
    mask = jp.masks.from_scores({"w": scores}, 0.5, pattern=Block(block), scope=scope)["w"]
    assert mask.shape == shape
    x, m = (np.asarray(a).reshape(-1, *shape[-2:]) for a in (scores, mask))
    means, kept = [], []
    for plane, keep in zip(x, m, strict=True):
        for i in range(0, shape[-2], block[0]):
            for j in range(0, shape[-1], block[1]):
                part = keep[i : i + block[0], j : j + block[1]]
                assert part.all() or not part.any()
                means.append(plane[i : i + block[0], j : j + block[1]].mean())
                kept.append(part.all())
    assert sum(kept) == round(0.5 * len(kept))
    if 0 < sum(kept) < len(kept):
        chosen = np.array(kept)
        assert np.array(means)[chosen].min() >= np.array(means)[~chosen].max() - 1e-6


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_channels(axis):
    scores = jnp.abs(random(3, 3, 4, 8))
    mask = jp.masks.from_scores({"w": scores}, 0.5, pattern=Channel(axis))["w"]
    shape = [1] * 4
    shape[axis] = scores.shape[axis]
    assert mask.shape == tuple(shape)
    others = tuple(i for i in range(4) if i != axis % 4)
    mean = np.asarray(scores.mean(others))
    kept = np.flatnonzero(np.asarray(mask).ravel())
    assert set(kept) == set(np.argsort(-mean, kind="stable")[: round(0.5 * mean.size)])
    pruned = jp.apply_masks({"w": scores}, {"w": mask})["w"]
    assert pruned.shape == scores.shape
    assert jp.sparsity({"w": pruned}) == pytest.approx(1 - len(kept) / mean.size)


def test_bad_patterns():
    with pytest.raises(ValueError, match="m=4"):
        NM(5, 4)
    with pytest.raises(ValueError, match="extent"):
        Block(())
    with pytest.raises(TypeError, match="integer"):
        Block((2, 0.5))
    scores = {"v": jnp.ones(4)}
    for pattern in (NM(2, 4), Block((2, 2)), Channel(1)):
        with pytest.raises(ValueError, match="'v'"):
            jp.masks.from_scores(scores, 0.5, pattern=pattern)
    with pytest.raises(ValueError, match="at most 0.5"):
        jp.masks.from_scores({"w": jnp.ones((4, 4))}, 0.8, pattern=NM(2, 4))
