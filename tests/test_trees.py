import re
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune import _trees


class Pair(NamedTuple):
    first: jax.Array
    second: dict


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: jax.Array
    steps: jax.Array


def test_paths_read_the_same_in_every_container(params, container):
    assert _trees.leaf_paths(container(params)) == [
        "conv/bias",
        "conv/kernel",
        "dense/bias",
        "dense/kernel",
        "embed",
    ]


def test_paths_of_other_nodes():
    tree = Pair(jnp.ones(2), {"a": [jnp.ones(2), Layer(jnp.ones((2, 2)), jnp.arange(3))]})
    assert _trees.leaf_paths(tree) == [
        "first",
        "second/a/0",
        "second/a/1/kernel",
        "second/a/1/steps",
    ]
    assert _trees.select(tree) == [False, False, True, False]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [False, True, False, True, True]),
        ("embed", [False, False, False, False, True]),
        (".*/kernel", [False, True, False, True, False]),
        (["embed", "dense/.*"], [False, False, True, True, True]),
        (lambda path, leaf: leaf.ndim == 1, [True, False, True, False, False]),
        (["embed", lambda path, leaf: "conv" in path], [True, True, False, False, True]),
    ],
)
def test_select(params, container, where, expected):
    assert _trees.select(container(params), where) == expected


def test_no_match_lists_near_misses(params):
    with pytest.raises(ValueError, match=re.escape("'dense/kernel'")):
        _trees.select(params, "dense/kernal")
    with pytest.raises(ValueError, match="begin with"):
        _trees.select(params, "kernel")


def test_bad_where(params):
    with pytest.raises(ValueError, match="no regular expression"):
        _trees.select(params, "(")
    with pytest.raises(TypeError, match="where"):
        _trees.select(params, 3)


def test_only_floating_leaves_are_selected():
    tree = {"step": jnp.zeros((2, 2), jnp.int32), "w": jnp.zeros((2, 2), jnp.bfloat16)}
    assert _trees.select(tree, ".*") == [False, True]
    with pytest.raises(ValueError, match="step"):
        _trees.select(tree, "step")


def test_compressed_leaves_are_leaves(params):
    tree = jp.quantize_tree(params)
    assert _trees.leaf_paths(tree) == _trees.leaf_paths(params)
    assert _trees.select(tree) == _trees.select(params)
