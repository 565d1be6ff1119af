"""Compressed trees to files and back."""

from jaxprune.export._checkpoint import disk_bytes, load, save

__all__ = ["disk_bytes", "load", "save"]
