"""Compressed trees to files and back."""

from jaxprune.export._checkpoint import disk_bytes, load, save
from jaxprune.export._qwix import from_qwix, to_qwix

__all__ = ["disk_bytes", "from_qwix", "load", "save", "to_qwix"]
