"""What was gained: bytes, bits, zeros and latency, as a table; accuracy against size, as a picture."""

from jaxprune.reports._gates import plot_gates
from jaxprune.reports._groups import plot_groups
from jaxprune.reports._lines import Row, human_bytes
from jaxprune.reports._plot import plot_accuracy
from jaxprune.reports._size import nbytes
from jaxprune.reports._table import Report, human_seconds, report, seconds
from jaxprune.reports._training import plot_training

__all__ = [
    "Report",
    "Row",
    "human_bytes",
    "nbytes",
    "plot_accuracy",
    "plot_gates",
    "plot_groups",
    "plot_training",
    "report",
    "seconds",
]
