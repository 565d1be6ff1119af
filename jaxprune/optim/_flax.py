"""Packed masks in `flax.serialization`: `to_bytes(opt_state)` and back."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import serialization

from jaxprune.masks import PackedMask, PackedTree


def _mask_state(mask: PackedMask) -> dict[str, Any]:
    return {"bits": mask.bits}


def _mask_from(target: PackedMask, state: dict[str, Any]) -> PackedMask:
    if state["bits"].shape != target.bits.shape:
        raise ValueError(
            f"masks: packed bits of shape {state['bits'].shape} in the file, expected "
            f"{target.bits.shape}; restore into a state of the same parameters"
        )
    return dataclasses.replace(target, bits=jnp.asarray(state["bits"]))


def _tree_state(tree: PackedTree) -> dict[str, Any]:
    return {str(i): _mask_state(mask) for i, mask in enumerate(tree.leaves)}


def _tree_from(target: PackedTree, state: dict[str, Any]) -> PackedTree:
    if len(state) != len(target.leaves):
        raise ValueError(
            f"masks: {len(state)} packed masks in the file, expected {len(target.leaves)}; "
            "restore into a state of the same parameters"
        )
    leaves = (_mask_from(mask, state[str(i)]) for i, mask in enumerate(target.leaves))
    return dataclasses.replace(target, leaves=tuple(leaves))


def register() -> None:
    """Tell flax how packed masks become dictionaries of arrays."""
    serialization.register_serialization_state(PackedMask, _mask_state, _mask_from, override=True)
    serialization.register_serialization_state(PackedTree, _tree_state, _tree_from, override=True)
