"""A smaller module from a module and masks."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxprune import _trees
from jaxprune._types import Masks
from jaxprune.program import TraceCache
from jaxprune.structure import CompactFunction
from jaxprune.structure import compact as compact_function

M = TypeVar("M", bound=nnx.Module)


def compact(
    model: M,
    masks: Masks,
    *args: Any,
    states: Mapping[int | str, Callable[[Any], Any] | None] | None = None,
    fold: str | None = None,
    verify: bool = False,
    **kwargs: Any,
) -> M:
    """A copy of a module without the units and layers that are masked.

    The copy has the attributes of the original, holding smaller variables, and is called the same way; it
    is an instance of a subclass, so that `nnx.jit`, `nnx.grad`, `nnx.Optimizer`, `train()` and `eval()`
    work on it. What the original call does to its variables (batch statistics, caches, random counters)
    happens to the copy's, and what it does to modules among its arguments happens to those. Modules among
    the arguments, such as caches, shrink with the module: `jp.nnx.small_arguments` cuts them.

    Submodules of the copy cannot be called on their own: their sizes, such as `num_heads`, are those of
    the original.

    Args:
      model: a module; only its `__call__` is compacted.
      masks: tree of bools like `nnx.state(model)`, or like a part of it such as
        `nnx.state(model, nnx.Param)`; what it leaves out is kept.
      *args: example inputs of the call, of any batch size.
      states: arguments that are no modules and shrink with the parameters, and what part of the result
        updates each: `{"cache": lambda out: out[1]}`, see `jp.trace`.
      fold: see `jp.compact`.
      verify: see `jp.compact`.
      **kwargs: further example inputs.

    Returns:
      The smaller module. `model` is left as it is.

    Raises:
      ValueError: masks whose paths the model lacks, variables that the module shares with an argument,
        and what `jp.compact` raises.

    Example:
      >>> from flax import nnx
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.down(nnx.relu(self.up(x)))
      >>> model, x = Net(nnx.Rngs(0)), jnp.ones((1, 4))
      >>> graphdef, state = nnx.split(model)
      >>> graph = jp.trace(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
      >>> masks = jp.structure.unit_masks(graph, jp.scores.magnitude(state), sparsity=0.5)
      >>> small = jp.nnx.compact(model, masks, x)
      >>> small.up.kernel.shape, small(x).shape
      ((4, 4), (1, 2))
    """
    graphdef, state = nnx.split(model)
    taken = _take_apart(args, kwargs)
    _check_apart(model, taken.modules)
    known = {_position(type(model), key, kwargs): select for key, select in (states or {}).items()}
    compact_fn, small_state = compact_function(
        _call_of(graphdef, type(model), taken.definitions),
        state,
        _for_state(masks, state),
        *taken.args,
        updates=_new_state,
        states=_all_states(known, taken),
        fold=fold,
        verify=verify,
        **taken.kwargs,
    )
    small = nnx.clone(model)
    small.__class__ = _small_class(type(model), compact_fn, known)
    nnx.update(small, small_state)
    return small


def small_arguments(
    small: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the original module, such as an empty cache, as the compacted one takes them.

    Args:
      small: from `jp.nnx.compact`.
      *args: as in a call of the original; modules and `states` among them are copied and cut.
      **kwargs: likewise.

    Returns:
      `(args, kwargs)` for a call of `small`.

    Raises:
      TypeError: a module that is not from `jp.nnx.compact`.
      ValueError: arguments of other sizes than those of the original.

    Example:
      >>> from flax import nnx
      >>> class Sum(nnx.Module):
      ...     def __init__(self):
      ...         self.seen = nnx.Variable(jnp.zeros((1, 8)))
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
      ...     def __call__(self, x, total):
      ...         total.seen[...] += self.up(x)
      ...         return self.down(total.seen[...])
      >>> model, x, total = Net(nnx.Rngs(0)), jnp.ones((1, 4)), Sum()
      >>> keep = jnp.arange(8) < 6
      >>> masks = {"up": {"kernel": keep[None], "bias": keep}, "down": {"kernel": keep[:, None]}}
      >>> small = jp.nnx.compact(model, masks, x, total)
      >>> (x, total), _ = jp.nnx.small_arguments(small, x, total)
      >>> y = small(x, total)
      >>> total.seen.shape
      (1, 6)
    """
    compact_fn = getattr(type(small), "_jaxprune_compact_fn", None)
    if compact_fn is None:
        raise TypeError(f"small: {type(small).__name__} does not come from jp.nnx.compact")
    taken = _take_apart(args, kwargs)
    found_args, found_kwargs = list(taken.args), dict(taken.kwargs)
    if taken.modules:
        found_kwargs[_MODULES] = compact_fn.small_state(_MODULES, taken.kwargs[_MODULES])
    for key in getattr(type(small), "_jaxprune_states", ()):
        place = found_kwargs if isinstance(key, str) else found_args
        place[key] = compact_fn.small_state(key, place[key])
    given = found_kwargs.pop(_MODULES, {})
    modules = [nnx.clone(module) for module in taken.modules]
    for i, module in enumerate(modules):
        nnx.update(module, given[str(i)])
    return _put(modules, tuple(found_args), found_kwargs)


# the keyword of the traced function that holds their states; no call has one of this name
_MODULES = "modules among the arguments"


class _Place(str):
    """What stands for a module among arguments: its number."""


class _Taken(NamedTuple):
    """Arguments without the modules among them.

    Attributes:
      args: with places for modules.
      kwargs: likewise; states of the modules besides, by number.
      modules: in flatten order.
      definitions: the static part of each.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modules: list[Any]
    definitions: tuple[Any, ...]


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _take_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Taken:
    modules: list[Any] = []

    def take(x: Any) -> Any:
        if not _is_module(x):
            return x
        known = [i for i, module in enumerate(modules) if module is x]  # given twice, it is one
        if not known:
            modules.append(x)
        return _Place(known[0] if known else len(modules) - 1)

    rest_args, rest_kwargs = jax.tree.map(take, (args, kwargs), is_leaf=_is_module)
    parts = [nnx.split(module) for module in modules]
    if modules:
        rest_kwargs[_MODULES] = {str(i): state for i, (_, state) in enumerate(parts)}
    return _Taken(rest_args, rest_kwargs, modules, tuple(definition for definition, _ in parts))


def _check_apart(model: Any, modules: list[Any]) -> None:
    """Refuses variables that the module and its arguments, or two arguments, have in common."""
    if not modules:
        return
    owners: dict[int, str] = {}
    named = [("the module itself", model), *((f"argument {i}", m) for i, m in enumerate(modules))]
    for owner, module in named:
        for path, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Variable) and owners.setdefault(id(node), owner) != owner:
                raise ValueError(
                    f"args: variable {'/'.join(map(str, path))!r} of {owner} among the modules is one of "
                    f"{owners[id(node)]} too, and would be updated twice; hand it over once"
                )


def _put(modules: list[Any], args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with modules in their places. Inverse of `_take_apart`."""
    back = lambda x: modules[int(x)] if isinstance(x, _Place) else x
    return jax.tree.map(back, (args, kwargs))


def _position(cls: type, key: int | str, kwargs: dict[str, Any]) -> int | str:
    """An argument of a call by position, unless it is given by name."""
    if isinstance(key, int) or key in kwargs:
        return key
    names = [*inspect.signature(cls.__call__).parameters]
    return names.index(key) - 1 if key in names else key


def _all_states(known: Mapping[int | str, Any], taken: _Taken) -> dict[int | str, Any]:
    """States for `jp.compact`: those of the result, and of the modules among the arguments."""
    of_result = {
        key: None if select is None else (lambda out, select=select: select(out[0]))
        for key, select in known.items()
    }
    return {**of_result, **({_MODULES: lambda out: out[2]} if taken.modules else {})}


def _new_state(out: Any) -> Any:
    return out[1]


def _call_of(graphdef: Any, cls: type, definitions: tuple[Any, ...]) -> Any:
    """The call of a module as a function of its state: `(state, *args) -> (result, new state, states of
    modules among the arguments)`.
    """

    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        module, given = nnx.merge(graphdef, state), kwargs.pop(_MODULES, {})
        modules = [nnx.merge(item, given[str(i)]) for i, item in enumerate(definitions)]
        args, kwargs = _put(modules, args, kwargs)
        result = cls.__call__(module, *args, **kwargs)
        return result, nnx.state(module), {str(i): nnx.state(x) for i, x in enumerate(modules)}

    return call


def _for_state(masks: Masks, state: Any) -> Masks:
    """Masks like the whole state."""
    paths, _, treedef = _trees.flatten(state)
    given = dict(zip(*_trees.flatten(masks)[:2], strict=True))
    for path in given:
        if path not in paths:
            raise ValueError(_trees.no_match(path, paths, parameter="masks"))
    return jax.tree.unflatten(treedef, [given.get(path, jnp.asarray(True)) for path in paths])


def _small_class(cls: Any, compact_fn: CompactFunction, states: Mapping[int | str, Any]) -> Any:
    """A subclass whose call runs at smaller sizes, for whatever static attributes the module has then."""
    functions = TraceCache()

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphdef, state = nnx.split(self)
        taken = _take_apart(args, kwargs)
        _check_apart(self, taken.modules)
        anew = lambda: compact_fn.of(
            _call_of(graphdef, cls, taken.definitions),
            updates=_new_state,
            states=_all_states(states, taken),
        )
        run = functions.get(_key((graphdef, taken.definitions)), anew)
        result, new, others = run(state, *taken.args, **taken.kwargs)
        nnx.update(self, nnx.filter_state(new, nnx.Not(nnx.Param)))
        for i, module in enumerate(taken.modules):
            nnx.update(module, others[str(i)])
        return result

    namespace = {
        "__call__": __call__,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "_jaxprune_compact_fn": compact_fn,
        "_jaxprune_states": tuple(states),
    }
    return type(cls)(f"Compact{cls.__name__}", (cls,), namespace)


def _key(parts: Any) -> Any:
    """Tells definitions apart; those that hold lists or plain dataclasses by what they print."""
    try:
        hash(parts)
    except TypeError:
        return repr(parts)
    return parts
