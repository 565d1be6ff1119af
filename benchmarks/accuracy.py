"""Test accuracy of the demo's models over several seeds.

python benchmarks/accuracy.py [--seeds 3]
"""

import argparse
import statistics

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxprune.cli import _demo, _mnist


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    console = Console(width=100)
    found = {name: [] for name in _demo.Models._fields}
    for seed in range(arguments.seeds):
        data = _mnist.load(seed)
        with Progress(console=console) as progress:
            models = _demo.build(_demo.Settings(seed=seed), data, progress)
        for name, tree in zip(models._fields, models, strict=True):
            found[name].append(100 * _demo.evaluate(tree, data))
    table = Table(title=f"MNIST CNN, 80 % pruned, int8: accuracy in %, {arguments.seeds} seeds")
    for column in ("model", "mean", "points below dense", "each"):
        table.add_column(column)
    dense = statistics.mean(found["dense"])
    for name, values in found.items():
        mean = statistics.mean(values)
        each = ", ".join(f"{value:.1f}" for value in values)
        table.add_row(name, f"{mean:.2f}", f"{dense - mean:.2f}", each)
    console.print(table)


if __name__ == "__main__":
    main()
