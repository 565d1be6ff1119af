"""Compressions one after the other, as TFMOT's collaborative optimization has them: each keeps what the
one before it made, through training, conversion and files.

The second table of docs/coverage.md is what these tests find, see `tests._tables`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests._tables import row
from tests.structure._zoo import normal

fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
X = normal(64, 32, seed=2)
DENSE = {"a": normal(32, 64), "b": normal(64, 32, seed=1)}
TARGET = fn({k: 0.7 * v + 0.1 for k, v in DENSE.items()}, X)
PRUNED, MASKS = jp.prune_tree(DENSE, 0.5)
NM, NM_MASKS = jp.prune_tree(DENSE, 0.5, pattern=jp.masks.NM(2, 4))


def loss(tree):
    return jnp.mean((jp.compressed(fn)(tree, X) - TARGET) ** 2)


def train(tree, tx, steps=40):
    @jax.jit
    def step(tree, state):
        grads = jax.grad(loss, allow_int=True)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    before = loss(tree)
    for _ in range(steps):
        tree, state = step(tree, state)
    assert loss(tree) < before
    return tree


adam = lambda: optax.adam(3e-3)
masked = lambda masks: lambda: jp.masked_update(adam(), masks)
trainable = lambda: jp.optim.trainable(adam())
decayed = lambda: optax.adamw(3e-3, weight_decay=0.1)
prepare, convert = jp.qat.prepare, jp.qat.convert
clusters = lambda tree: jp.cluster_tree(tree, bits=3)
asis = lambda tree: tree

# what comes before training, the optimizer, what comes after; then what must hold: the sparsity that the
# pruning made, the number of values of a leaf (None: any), the bits of a weight in memory, at most
COMBINATIONS = {
    "prune, fine-tune": (lambda: PRUNED, masked(MASKS), asis, 0.5, None, 32),
    "prune, fine-tune, quantize": (lambda: PRUNED, masked(MASKS), jp.quantize_tree, 0.5, None, 9),
    "prune, fine-tune, cluster": (lambda: PRUNED, masked(MASKS), clusters, 0.5, 8, 3.2),
    "prune, QAT": (lambda: prepare(DENSE, 4, masks=MASKS), decayed, convert, 0.5, None, 5),
    "2:4, QAT": (lambda: prepare(NM, 4, masks=NM_MASKS), decayed, convert, 0.5, None, 5),
    "2:4, fine-tune, sparsify, quantize": (
        lambda: NM,
        masked(NM_MASKS),
        lambda tree: jp.quantize_tree(jp.sparse.sparsify_tree(tree)),
        0.5,
        None,
        7,
    ),
    "cluster, fine-tune": (lambda: clusters(DENSE), trainable, asis, None, 8, 3.2),
    "cluster, QAT": (lambda: prepare(clusters(DENSE)), trainable, convert, None, 8, 3.2),
    "clusters in training": (
        lambda: DENSE,
        lambda: jp.optim.clustered(adam(), bits=3),
        clusters,
        None,
        8,
        3.2,
    ),
    "prune, cluster, fine-tune": (lambda: clusters(PRUNED), trainable, asis, 0.5, 8, 3.2),
    "prune, cluster, QAT": (lambda: prepare(clusters(PRUNED)), trainable, convert, 0.5, 8, 3.2),
    "prune, clusters in training": (
        lambda: PRUNED,
        lambda: jp.optim.clustered(adam(), bits=3, preserve_zeros=True),
        clusters,
        0.5,
        8,
        3.2,
    ),
    "factorize, QAT": (
        lambda: prepare(jp.factorize_tree(DENSE, rank=2), 8),
        trainable,
        convert,
        None,
        None,
        2,
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_each_keeps_what_the_one_before_made(name, tmp_path):
    start, optimizer, after, sparsity, values, bits = COMBINATIONS[name]
    trained = train(start(), optimizer())
    small = after(trained)
    dense = {k: np.asarray(v) for k, v in jp.materialize_tree(small).items()}
    cells = ["-", "-", "-"]
    if sparsity is not None:
        zeros = sum(int((v == 0).sum()) for v in dense.values()) / sum(
            v.size for v in dense.values()
        )
        assert zeros >= sparsity
        for k, mask in (NM_MASKS if name.startswith("2:4") else MASKS).items():
            assert not dense[k][~np.asarray(mask)].any()
        cells[0] = f"{sparsity}"
    if values is not None:
        assert all(np.unique(v).size <= values for v in dense.values())
        cells[1] = f"{values}"
    stored = 8 * jp.nbytes(small) / sum(v.size for v in dense.values())
    assert stored <= bits
    cells[2] = f"{stored:.1f}"
    wanted = np.asarray(jp.compressed(fn)(trained, X))
    if after in (asis, convert):  # what was trained is what is shipped
        found = jp.compressed(fn)(small, X)
        np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    exact = np.asarray(fn(dense, X))
    found = jp.compressed(fn)(small, X)
    np.testing.assert_allclose(found, exact, atol=2e-3 * np.abs(exact).max())
    jp.export.save(tmp_path / "small", small)
    loaded = jp.export.load(tmp_path / "small")
    for k, v in jp.materialize_tree(loaded).items():
        np.testing.assert_array_equal(v, dense[k])
    row("coverage.md", name, *cells)
