"""Compressed trees to files and back."""

from jaxprune.export._checkpoint import disk_bytes, load, save
from jaxprune.export._qwix import from_qwix, to_qwix
from jaxprune.export._stages import coded_bytes, stages
from jaxprune.export._structure import register

__all__ = [
    "coded_bytes",
    "disk_bytes",
    "from_qwix",
    "load",
    "register",
    "save",
    "stages",
    "to_qwix",
]
