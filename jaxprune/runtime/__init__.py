"""Running a function on compressed leaves, without making them dense first."""

from jaxprune.runtime._choose import Choice, tuning_file
from jaxprune.runtime._compressed import CompressedFunction, compressed
from jaxprune.runtime._tune import tune

__all__ = ["Choice", "CompressedFunction"]
