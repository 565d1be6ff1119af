"""State that is no parameter: caches and recurrent states, whose axes shrink with the parameters.

A state comes in as an argument and leaves as part of the output, for the next call, as what loops carry
does. The indices of its axes are tied to those that leave; it is zero where units are masked if it comes
in so and nothing else is written there.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import _trees
from jaxprune.program import Inputs, Program, inputs_of, is_traced_input

States = Mapping[int | str, Callable[[Any], Any] | None]
"""By argument (its name, or its position after the parameters) which part of the output updates it;
`None` where it is only read.
"""


class StateLeaf(NamedTuple):
    """One array of a state.

    Attributes:
      name: the key of its argument in `states`, and the path within.
      input: its position among the arrays of the arguments.
      output: position of the output that updates it, or `None`.
    """

    name: str
    input: int
    output: int | None


def state_name(key: int | str, path: str) -> str:
    """The name of an array of a state."""
    return f"{key}/{path}" if path else str(key)


def state_inputs(
    fn: Callable[..., Any], given: Inputs, states: States, args: tuple[Any, ...], kwargs: Any
) -> dict[int, tuple[int | str, str]]:
    """Which arrays of the arguments are states: `{position: (key, path within the argument)}`.

    Raises:
      ValueError: a key that names no argument that holds arrays.
    """
    found = {}
    for key in states:
        prefix = _prefix(fn, key, args, kwargs)
        mine = [
            i
            for i, name in enumerate(given.names)
            if name == prefix or name.startswith((f"{prefix}[", f"{prefix}."))
        ]
        if not mine:
            raise ValueError(
                f"states: {key!r} names no argument that holds arrays; arguments after the parameters: "
                f"{', '.join(given.names[:6])}"
            )
        argument = kwargs[prefix] if prefix in kwargs else args[int(prefix[5:-1])]
        leaves = zip(*_trees.flatten(argument)[:2], strict=True)
        paths = [path for path, x in leaves if is_traced_input(x)]
        found |= {i: (key, path) for i, path in zip(mine, paths, strict=True)}
    return found


def _prefix(fn: Callable[..., Any], key: int | str, args: tuple[Any, ...], kwargs: Any) -> str:
    """The argument as `Inputs.names` calls it."""
    if isinstance(key, str) and key not in kwargs:
        try:
            names = [*inspect.signature(fn).parameters]
        except (TypeError, ValueError):
            names = []
        key = names.index(key) - 1 if key in names else key
    return f"args[{key}]" if isinstance(key, int) else key


def state_leaves(
    fn: Callable[..., Any],
    program: Program,
    states: States,
    args: tuple[Any, ...],
    kwargs: Any,
) -> tuple[StateLeaf, ...]:
    """Every array of the states, and what updates it.

    Raises:
      ValueError: a key that names no argument; an update that lacks an array of its state, or has it in
        another number of axes.
    """
    if not states:
        return ()
    given = inputs_of(args, kwargs)
    numbered = program.out_tree.unflatten(range(len(program.outputs)))
    updates = {
        key: dict(zip(*_trees.flatten(select(numbered))[:2], strict=True))
        for key, select in states.items()
        if select is not None
    }
    found = []
    for position, (key, path) in state_inputs(fn, given, states, args, kwargs).items():
        output = None
        if key in updates:
            output = updates[key].get(path)
            rank = np.ndim(given.arrays[position])
            if output is None or len(program.avals[program.outputs[output]].shape) != rank:
                raise ValueError(
                    f"states: {key!r}: its leaf {path!r} has no update of {rank} axes among the outputs "
                    f"that were named; they hold {[*updates[key]][:6]}"
                )
        found.append(StateLeaf(state_name(key, path), position, output))
    return tuple(found)


def full_sizes(
    given: Inputs, names: Mapping[int, str], sizes: Mapping[str, tuple[tuple[int, ...], Any]]
) -> list[Any]:
    """The arrays of the arguments, in place of small states their shapes before anything was removed.

    Args:
      given: the arguments.
      names: of those that are states, by position.
      sizes: by name the full shape, and per axis the indices that are left.

    Raises:
      ValueError: a state of a size that is not the small one.
    """
    found = list(given.arrays)
    for position, name in names.items():
        x = found[position]
        if name not in sizes:
            raise ValueError(f"states: {name!r} was no state when the function was compacted")
        full, kept = sizes[name]
        shape = list(np.shape(x))
        for axis, (n, index) in enumerate(zip(full, kept, strict=True)):
            if len(index) == n:
                continue
            if len(shape) != len(full) or shape[axis] != len(index):
                raise ValueError(
                    f"states: {name!r} has shape {tuple(shape)}, and {len(index)} of {n} entries of axis "
                    f"{axis} are left: cut it with compact_fn.small_state, or jp.nnx.small_arguments"
                )
            shape[axis] = n
        found[position] = jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    return found
