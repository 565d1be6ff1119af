"""A smaller module from a module and masks."""

from typing import Any, TypeVar

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
    fold: str | None = None,
    verify: bool = False,
    **kwargs: Any,
) -> M:
    """A copy of a module without the units and layers that are masked.

    The copy has the attributes of the original, holding smaller variables, and is called the same way; it
    is an instance of a subclass, so that `nnx.jit`, `nnx.grad`, `nnx.Optimizer`, `train()` and `eval()`
    work on it. What the original call does to its variables (batch statistics, random counters) happens
    to the copy's. Submodules of the copy cannot be called on their own: their sizes, such as `num_heads`,
    are still those of the original.

    Args:
      model: a module; only its `__call__` is compacted.
      masks: tree of bools like `nnx.state(model)`, or like a part of it such as
        `nnx.state(model, nnx.Param)`; what it leaves out is kept.
      *args: example inputs of the call, of any batch size.
      fold: see `jp.compact`.
      verify: see `jp.compact`.
      **kwargs: further example inputs.

    Returns:
      The smaller module. `model` is left as it is.

    Raises:
      ValueError: masks whose paths the model lacks, and what `jp.compact` raises.

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
    compact_fn, small_state = compact_function(
        _call_of(graphdef, type(model)),
        state,
        _for_state(masks, state),
        *args,
        updates=_new_state,
        fold=fold,
        verify=verify,
        **kwargs,
    )
    small = nnx.clone(model)
    small.__class__ = _small_class(type(model), compact_fn)
    nnx.update(small, small_state)
    return small


def _new_state(out: Any) -> Any:
    return out[1]


def _call_of(graphdef: Any, cls: type) -> Any:
    """The call of a module as a function of its state: `(state, *args) -> (result, new state)`."""

    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        module = nnx.merge(graphdef, state)
        result = cls.__call__(module, *args, **kwargs)
        return result, nnx.state(module)

    return call


def _for_state(masks: Masks, state: Any) -> Masks:
    """Masks like the whole state."""
    paths, _, treedef = _trees.flatten(state)
    given = dict(zip(*_trees.flatten(masks)[:2], strict=True))
    for path in given:
        if path not in paths:
            raise ValueError(_trees.no_match(path, paths, parameter="masks"))
    return jax.tree.unflatten(treedef, [given.get(path, jnp.asarray(True)) for path in paths])


def _small_class(cls: Any, compact_fn: CompactFunction) -> Any:
    """A subclass whose call runs at smaller sizes, for whatever static attributes the module has then."""
    functions = TraceCache()

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphdef, state = nnx.split(self)
        anew = lambda: compact_fn.of(_call_of(graphdef, cls), updates=_new_state)
        result, new = functions.get(graphdef, anew)(state, *args, **kwargs)
        nnx.update(self, nnx.filter_state(new, nnx.Not(nnx.Param)))
        return result

    namespace = {"__call__": __call__, "__doc__": cls.__doc__, "__module__": cls.__module__}
    return type(cls)(f"Compact{cls.__name__}", (cls,), namespace)
