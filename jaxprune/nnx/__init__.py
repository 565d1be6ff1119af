"""For `flax.nnx`: modules in, modules out."""

from jaxprune.nnx._compact import compact

__all__ = ["compact"]
