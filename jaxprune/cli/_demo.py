"""The main job, end to end: train, prune while training, quantize, halve the FLOPs, save, report."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxprune import export, optim, schedules
from jaxprune._types import PyTree
from jaxprune.cli import _cnn, _mnist
from jaxprune.graph import trace
from jaxprune.quantize import dequantize_tree, quantize_tree
from jaxprune.reports import human_bytes, human_seconds, nbytes, plot_accuracy, report, seconds
from jaxprune.scores import magnitude
from jaxprune.structure import compact, unit_masks


@dataclass(frozen=True)
class Settings:
    """What the command line sets.

    Attributes:
      seed: of the data split, the weights and the batches.
      sparsity: fraction of weights to remove, in [0, 1].
      bits: 8, 4 or 2.
      epochs: of dense training, and again of pruning.
      out: folder for checkpoints and the plot.
    """

    seed: int = 0
    sparsity: float = 0.8
    bits: int = 8
    epochs: int = 8
    out: Path = Path("jaxprune-demo")


class Models(NamedTuple):
    """The stages.

    Attributes:
      dense: trained without masks for as many epochs as the others.
      pruned: dense for half of the epochs, then pruned gradually.
      quantized: `pruned`, its weights in few bits.
      small: `dense` without the channels and neurons that half of its FLOPs went into, fine-tuned.
    """

    dense: PyTree
    pruned: PyTree
    quantized: PyTree
    small: PyTree


def build(settings: Settings, data: _mnist.Split, progress: Progress) -> Models:
    """Trains the dense model, branches half-way to prune it, and quantizes the result."""
    steps = settings.epochs * (len(data.train_labels) // _cnn.BATCH)

    def stage(name: str, state: _cnn.TrainState, seed: int) -> _cnn.TrainState:
        task = progress.add_task(name, total=steps)
        batches = _cnn.batches(data.train_images, data.train_labels, settings.epochs, seed)
        return _cnn.train(state, batches, lambda: progress.advance(task))

    adam = optax.adam(1e-3)
    half = stage("train", _cnn.new_state(_cnn.new_params(settings.seed), adam), settings.seed)
    dense = stage("train on, dense", half, settings.seed + 1)
    # the schedule reaches its end after three quarters, so that the pruned network can recover
    schedule = schedules.cubic(settings.sparsity, end=max(1, steps * 3 // 4), every=8)
    pruning = _cnn.new_state(half.params, optim.gradual(adam, schedule))
    pruned = stage(f"prune to {settings.sparsity:.0%}", pruning, settings.seed + 1)
    image = jax.ShapeDtypeStruct((1, *data.train_images.shape[1:]), jnp.float32)
    graph = trace(_cnn.apply, dense.params, image)
    # convolutions run fastest where channels fill whole vectors
    masks = unit_masks(graph, magnitude(dense.params), flops=0.5, round_to=32)
    _, fewer = compact(_cnn.apply, dense.params, masks, image)
    small = stage("halve the FLOPs", _cnn.new_state(fewer, adam), settings.seed + 2)
    quantized = quantize_tree(pruned.params, bits=settings.bits)
    return Models(dense.params, pruned.params, quantized, small.params)


def run(settings: Settings) -> None:
    """Runs all stages and prints the tables."""
    console = Console()
    if settings.out.exists() and not settings.out.is_dir():
        raise NotADirectoryError(f"--out: {settings.out} is a file; name a folder")
    data = _mnist.load(settings.seed)
    console.print(
        f"MNIST, {len(data.train_labels):,} training and {len(data.test_labels):,} test images; "
        f"a CNN of {sum(x.size for x in jax.tree.leaves(_cnn.new_params(0))):,} parameters"
    )
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        models = build(settings, data, progress)
        task = progress.add_task("save and reload", total=len(models))
        folders = [settings.out / name for name in Models._fields]
        found = []
        for tree, folder in zip(models, folders, strict=True):
            export.save(folder, tree, overwrite=True)
            found.append(_in_a_fresh_process(folder, settings.seed))
            progress.advance(task)
    sizes = [export.disk_bytes(folder) for folder in folders]
    names = [
        "dense",
        f"pruned {settings.sparsity:.0%}",
        f"pruned, int{settings.bits}",
        "half the FLOPs",
    ]
    console.print(report(None, models.dense, models.quantized))
    console.print(_summary(names, models, found, sizes))
    console.print(_speed(models.dense, models.small, data.test_images[:64]))
    picture = plot_accuracy(
        settings.out / "accuracy.png", names, sizes, found, title="MNIST CNN: accuracy against size"
    )
    console.print(f"checkpoints and plot: {settings.out}/ ({picture.name})", highlight=False)


def _summary(names: list[str], models: Models, found: list[float], sizes: list[int]) -> Table:
    table = Table(title="Test accuracy from the reloaded files")
    for column in ("model", "accuracy", "non-zero", "memory", "disk", "disk ratio"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, tree, value, size in zip(names, models, found, sizes, strict=True):
        leaves = jax.tree.leaves(dequantize_tree(tree))
        table.add_row(
            name,
            f"{value:.2%}",
            f"{sum(int(jnp.count_nonzero(x)) for x in leaves):,}",
            human_bytes(nbytes(tree)),
            human_bytes(size),
            f"{sizes[0] / size:.2f}x",
        )
    return table


def _speed(dense: PyTree, small: PyTree, images: np.ndarray) -> Table:
    """What the smaller network saves, counted and measured."""
    table = Table(title=f"Channels removed for good, on a batch of {len(images)}")
    for column in ("model", "widths", "MFLOPs", "latency", "faster"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    # in turns, so that whatever else the machine does falls on both
    turns = [[seconds(_cnn.apply, tree, images) for tree in (dense, small)] for _ in range(3)]
    times = [min(column) for column in zip(*turns, strict=True)]
    for name, tree, time in zip(("dense", "half the FLOPs"), (dense, small), times, strict=True):
        flops = trace(_cnn.apply, tree, images).cost().flops
        widths = "-".join(map(str, _cnn.sized_for(tree).features))
        faster = f"{times[0] / time:.2f}x"
        table.add_row(name, widths, f"{flops / 1e6:.0f}", human_seconds(time), faster)
    return table


def _in_a_fresh_process(folder: Path, seed: int) -> float:
    """Test accuracy of a saved model, measured by a new interpreter that has only the folder."""
    command = [sys.executable, "-m", "jaxprune.cli", "evaluate", str(folder), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"evaluating {folder} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["accuracy"])


def evaluate_saved(folder: Path, seed: int) -> float:
    """Test accuracy of the model in a folder."""
    data = _mnist.load(seed)
    params = dequantize_tree(export.load(folder))
    return float(_cnn.accuracy(params, data.test_images, data.test_labels))


def evaluate(tree: PyTree, data: _mnist.Split) -> float:
    """Test accuracy of parameters, compressed or not."""
    return float(_cnn.accuracy(dequantize_tree(tree), data.test_images, data.test_labels))
