"""Kinds and labels of groups, and choosing by them."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp
from tests.structure import _more_networks  # noqa: F401  registers its networks
from tests.structure._zoo import build, linen, normal

KINDS = {
    "mlp": {"neurons": 2},
    "flatten_cnn": {"channels": 2, "neurons": 1},
    "residual": {"channels": 5},
    "squeeze_excite": {"channels": 1, "neurons": 1},
    "group_and_instance_norm": {"channels": 3},
    "transformer": {"stream": 1, "neurons": 2, "heads": 2, "head dim": 4},
    "mixer": {"neurons": 2},
    "lstm": {"states": 1, "neurons": 1},
    "qkv_in_one": {"heads": 1, "head dim": 1},
    "grouped_query_attention": {"kv heads": 1, "queries per kv head": 1, "head dim": 2},
    "scanned_residual_stream": {"stream": 1, "layers": 1, "neurons": 1},
    "vision_transformer": {"stream": 1, "neurons": 1, "heads": 1, "head dim": 1},
    "state_space_model": {"states": 1, "neurons": 1},
    "linear_attention": {"heads": 1, "head dim": 1},
    "routed_experts": {"experts": 1, "neurons": 1},
    "convnext_block": {"stream": 1, "neurons": 1},
    "decoding_with_a_cache": {"stream": 1, "heads": 1, "head dim": 1},
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_networks(name):
    fn, params, x = build(name)
    graph = jp.trace(fn, params, x)
    assert Counter(group.kind for group in graph.groups) == KINDS[name]
    labels = [group.label for group in graph.groups]
    assert len(set(labels)) == len(labels)
    for group in graph.groups:
        assert group.kind in group.label
        assert str(group.size) in repr(group)


@pytest.mark.parametrize("shared", ["repeat", "reshape", "one"])
def test_grouped_queries_however_they_are_written(shared):
    def fn(p, x):
        q = jnp.einsum("bti,ihd->bthd", x, p["q"])
        k, v = (jnp.einsum("bti,ihd->bthd", x, p[name]) for name in "kv")
        if shared == "repeat":
            k, v = (jnp.repeat(z, 3, axis=2) for z in (k, v))
        y = jax.nn.dot_product_attention(q, k, v)
        return jnp.einsum("bthd,hdo->bto", y, p["o"])

    kv = 1 if shared == "one" else 2
    params = {name: jnp.ones((10, kv, 4)) for name in "kv"}
    params |= {"q": jnp.ones((10, 3 * kv, 4)), "o": jnp.ones((3 * kv, 4, 5))}
    graph = jp.trace(fn, params, normal(2, 6, 10))
    sizes = {(group.kind, group.size) for group in graph.groups}
    expected = {("queries per kv head", 3), ("head dim", 4), ("kv heads", 2)}
    assert sizes == expected - ({("kv heads", 2)} if kv == 1 else set())


class TestChoosing:
    fn, params, x = build("transformer")
    graph, fn = jp.trace(fn, params, x), staticmethod(fn)
    scores = jp.scores.random(params, jax.random.key(0))

    def masked(self, **how):
        masks = jp.structure.unit_masks(self.graph, self.scores, sparsity=0.5, **how)
        gone = self.graph.removal(masks).units
        return {group.label for group in self.graph.groups if gone[group.units].any()}

    @pytest.mark.parametrize(
        ("how", "kinds"),
        [
            ({"only": "neurons"}, {"neurons"}),
            ({"only": ["heads", "head dim"]}, {"heads", "head dim"}),
            ({"where": "neurons"}, {"neurons"}),
            (
                {"where": ".*/MultiHeadDotProductAttention_[01]/value/.*"},
                {"stream", "heads", "head dim"},
            ),
            ({"where": lambda group: group.size == 32}, {"neurons"}),
            ({"ignore": ["stream", "heads", "head dim"]}, {"neurons"}),
        ],
    )
    def test_units(self, how, kinds):
        chosen = self.masked(**how, scope="leaf")
        assert {group.kind for group in self.graph.groups if group.label in chosen} == kinds

    def test_one_group_by_label_name_and_path(self):
        one = next(group for group in self.graph.groups if group.kind == "neurons")
        for where in (one.label, one.name, one.members[0][0]):
            assert self.masked(where=where, scope="leaf") >= {one.label}
        assert self.masked(where=one.label) == {one.label}

    def test_everywhere(self, tmp_path):
        stats = jp.calibrate(self.fn, self.params, [self.x])
        found = jp.structure.activation_scores(self.graph, self.params, stats, only="neurons")
        names = {group.name for group in self.graph.groups if group.kind == "neurons"}
        assert found.keys() == names
        masks = jp.masks.from_scores(
            self.scores, 0.5, pattern=jp.structure.Units(self.graph, only="neurons")
        )
        gone = self.graph.removal(masks).units
        assert {g.kind for g in self.graph.groups if gone[g.units].any()} == {"neurons"}
        assert self.graph.tabulate(where="heads").row_count == 2
        assert jp.reports.plot_groups(tmp_path / "g.svg", self.graph, only="heads").exists()

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"only": "neuron"}, "did you mean 'neurons'"),
            ({"only": "experts"}, "no group is of kind 'experts'.*stream"),
            ({"where": "experts"}, "no group is of kind 'experts'"),
            ({"where": "nothing.*"}, "matches no group.*kinds.*groups"),
            ({"where": lambda group: False}, "selects no group"),
            ({"only": "neurons", "where": "heads"}, "no group is of kind 'neurons' and matches"),
        ],
    )
    def test_bad_choices(self, how, message):
        with pytest.raises(ValueError, match=message):
            self.masked(**how)
        with pytest.raises(TypeError, match="where"):
            self.masked(where=3)

    def test_stacked_layers_are_no_units(self):
        fn, params, x = build("scanned_residual_stream")
        graph = jp.trace(fn, params, x)
        with pytest.raises(ValueError, match="layer_masks"):
            jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5, only="layers")


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4, 0.5, 0.75, 0.9])
def test_an_axis_that_groups_divide_loses_what_is_asked(scope, sparsity):
    body = lambda x: nn.Dense(3)(nn.relu(nn.GroupNorm(8)(nn.Conv(64, (3, 3))(x))).mean((1, 2)))
    module, x = linen(body), normal(1, 6, 6, 3)
    params = module.init(jax.random.key(0), x)
    graph = jp.trace(module.apply, params, x)
    scores = jp.scores.random(params, jax.random.key(1))
    masks = jp.structure.unit_masks(graph, scores, sparsity=sparsity, scope=scope)
    left = jp.structure.widths(graph, masks)["params/Conv_0/kernel"][3]
    assert abs(left - 64 * (1 - sparsity)) <= (3 if scope == "leaf" else 4)
    if sparsity == 0.5:  # one of the two alone is as good
        assert np.isclose(left, 32, atol=2)


def test_table_and_reprs():
    fn, params, x = build("flatten_cnn")
    graph = jp.trace(fn, params, x)
    short, full = graph.tabulate(), graph.tabulate(every=True)
    assert short.row_count < full.row_count == len(graph.groups) + len(graph.frozen)
    assert "hidden" in str(short.caption)
    assert full.caption is None
    reasons = [text for text in short.columns[5].cells if "window" in str(text)]
    assert not reasons
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5)
    small, _ = jp.compact(fn, params, masks, x)
    stats = jax.tree.leaves(
        jp.calibrate(fn, params, [x]), is_leaf=lambda s: isinstance(s, jp.Stats)
    )
    for found in (graph, graph.cost(), graph.summary(), small, *graph.groups, *stats):
        assert len(repr(found)) < 200
        assert "array(" not in repr(found)


def test_shares_of_a_table_by_hand():
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2)), "c": jnp.ones((2, 2))}
    fn = lambda p, x: jnp.tanh(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    table = jp.trace(fn, params, jnp.ones((1, 4))).tabulate(where="a/neurons")
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[:5] == ["a/neurons", "neurons", "8", f"{48 / 52:.1%}", f"{48 / 52:.1%}"]
