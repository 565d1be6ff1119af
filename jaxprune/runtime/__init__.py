"""Running a function on compressed leaves, without making them dense first."""

from jaxprune.runtime._choose import Choice
from jaxprune.runtime._compressed import CompressedFunction, compressed

__all__ = ["Choice", "CompressedFunction"]
