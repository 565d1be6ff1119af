"""Model compression for JAX and Flax as pure functions over pytrees.

Stages, in the order of use: `scores` and `budgets` say what matters, `masks` selects, `optim` trains
under masks, `trace`, `structure` and `compact` remove channels for good, `quantize` stores weights in
few bits, `share` lets them share values and factors, `sparse` stores what pruning left, `compressed`
runs on all, `distill` recovers accuracy, `gates` decide per input what runs, `export` saves, `report`
shows what was gained.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxprune import (
    masks,
    quantize,
    schedules,
    scores,
    share,
    sparse,
    structure,
)
from jaxprune._uses import Uses
from jaxprune.graph import Cost, Graph, Group, Summary, trace
from jaxprune.masks import (
    apply_masks,
    pack_masks,
    prune_tree,
    sparsity,
    unpack_masks,
)
from jaxprune.program import uses
from jaxprune.quantize import (
    QuantizedArray,
    dequantize_tree,
    fake_quantize,
    fake_quantize_tree,
    quantize_tree,
)
from jaxprune.runtime import compressed
from jaxprune.share import (
    ClusteredArray,
    LowRankArray,
    cluster_tree,
    factorize_tree,
    materialize_tree,
    tie_tree,
)
from jaxprune.sparse import SparseArray, sparsify_tree
from jaxprune.structure import CompactFunction, compact

if TYPE_CHECKING:
    from jaxprune import (
        budgets,
        calibration,
        distill,
        export,
        gates,
        linen,
        nnx,
        optim,
        qat,
        reconstruct,
        reports,
        rewrite,
    )
    from jaxprune.calibration import Stats, calibrate, quantize_activations
    from jaxprune.optim import masked_update
    from jaxprune.reconstruct import awq, gptq, sparsegpt
    from jaxprune.reports import nbytes, report
    from jaxprune.rewrite import smooth_quant

__version__ = "0.1.0"

__all__ = [
    "ClusteredArray",
    "CompactFunction",
    "Cost",
    "Graph",
    "Group",
    "LowRankArray",
    "QuantizedArray",
    "SparseArray",
    "Stats",
    "Summary",
    "Uses",
    "apply_masks",
    "awq",
    "budgets",
    "calibrate",
    "calibration",
    "cluster_tree",
    "compact",
    "compressed",
    "dequantize_tree",
    "distill",
    "export",
    "factorize_tree",
    "fake_quantize",
    "fake_quantize_tree",
    "gates",
    "gptq",
    "linen",
    "masked_update",
    "masks",
    "materialize_tree",
    "nbytes",
    "nnx",
    "optim",
    "pack_masks",
    "prune_tree",
    "qat",
    "quantize",
    "quantize_activations",
    "quantize_tree",
    "reconstruct",
    "report",
    "rewrite",
    "schedules",
    "scores",
    "share",
    "smooth_quant",
    "sparse",
    "sparsegpt",
    "sparsify_tree",
    "sparsity",
    "structure",
    "tie_tree",
    "trace",
    "unpack_masks",
    "uses",
]

_WHEN_USED = (
    "budgets",
    "calibration",
    "distill",
    "export",
    "gates",
    "linen",
    "nnx",
    "optim",
    "qat",
    "reconstruct",
    "reports",
    "rewrite",
)  # imports stay quick

_HOMES = {
    "Stats": "calibration",
    "awq": "reconstruct",
    "calibrate": "calibration",
    "gptq": "reconstruct",
    "masked_update": "optim",
    "nbytes": "reports",
    "quantize_activations": "calibration",
    "report": "reports",
    "smooth_quant": "rewrite",
    "sparsegpt": "reconstruct",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxprune.{_HOMES[name]}"), name)
    if name in _WHEN_USED:
        return importlib.import_module(f"jaxprune.{name}")
    raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_WHEN_USED})
