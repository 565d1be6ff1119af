"""Symbolic sizes (`jax.export.symbolic_shape`): numbers that stand for them where indices are counted."""

from typing import Any

from jax.export import is_symbolic_dim

_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


_FUNCTIONS = {
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "max": max,
    "min": min,
    "non_negative": lambda a: max(a, 0),
}


class _Names(dict):
    """A number for each variable: divisible as batches are, and like no size that anyone writes down."""

    def __missing__(self, name: str) -> int:
        k = len(self) - len(_FUNCTIONS)
        self[name] = 24 * _PRIMES[k % len(_PRIMES)] * (1 + k // len(_PRIMES))
        return self[name]


def is_symbolic(shape: Any) -> bool:
    """Whether some size of a shape is symbolic."""
    return any(is_symbolic_dim(n) for n in shape)


def sized(x: Any) -> Any:
    """Numbers in place of symbolic sizes, in shapes, tuples and dicts of parameters."""
    if is_symbolic_dim(x):  # printed as an expression of its variables
        return int(eval(str(x), {"__builtins__": {}}, _NAMES))
    if isinstance(x, tuple):
        parts = [sized(v) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return {key: sized(v) for key, v in x.items()} if type(x) is dict else x


_NAMES = _Names(_FUNCTIONS)
