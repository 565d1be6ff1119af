"""What reaches each weight of a function, and how to quantize it."""

from jaxprune.calibration._activations import quantize_activations, scale_of_range
from jaxprune.calibration._calibrate import calibrate, ranges_seen, stats_leaves
from jaxprune.calibration._correct import correct_biases
from jaxprune.calibration._equalize import equalize
from jaxprune.calibration._fold import fold_batch_norm
from jaxprune.calibration._products import first_and_last
from jaxprune.calibration._scalings import (
    Scaling,
    apply_factors,
    holds,
    ranges,
    scalings_of,
    with_scaled,
)
from jaxprune.calibration._stats import Stats

__all__ = ["Stats", "correct_biases", "equalize", "first_and_last", "fold_batch_norm"]
