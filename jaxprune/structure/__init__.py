"""Structure: units of a traced function, masked whole and removed for good."""

from jaxprune.structure._compact import compact
from jaxprune.structure._units import unit_masks, widths

__all__ = ["unit_masks", "widths"]
