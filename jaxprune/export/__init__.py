"""Compressed trees to files and back."""

from jaxprune.export._checkpoint import disk_bytes, load, save
from jaxprune.export._model import save_model
from jaxprune.export._qwix import from_qwix, to_qwix
from jaxprune.export._served import LoadedModel, load_model
from jaxprune.export._stages import coded_bytes, stages
from jaxprune.export._structure import register

__all__ = [
    "LoadedModel",
    "coded_bytes",
    "disk_bytes",
    "from_qwix",
    "load",
    "load_model",
    "register",
    "save",
    "save_model",
    "stages",
    "to_qwix",
]
