"""Commands and their options; the work is done in the modules beside this one."""

import json
from pathlib import Path
from typing import Annotated

import typer

import jaxprune

app = typer.Typer(
    name="jaxprune",
    help="Model compression for JAX and Flax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(jaxprune.__version__)
        raise typer.Exit


@app.command()
def tune(
    width: Annotated[int, typer.Option(help="Width of the matrices, a multiple of 128.")] = 2048,
) -> None:
    """Measure the ways to multiply by quantized weights here; jp.compressed uses the fastest."""
    from rich.console import Console
    from rich.table import Table

    from jaxprune.runtime import tune as measure
    from jaxprune.runtime import tuning_file

    try:
        found = measure(width=width)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    rows = list(next(iter(next(iter(found.values())).values())))
    table = Table(title=f"Milliseconds of a product with {width}\u00b2 codes")
    for column in ("codes", "lowering", *(f"{n} rows" for n in rows)):
        table.add_column(column, justify="left" if column in ("codes", "lowering") else "right")
    for kind, lowerings in found.items():
        best = {n: min(times[n] for times in lowerings.values()) for n in rows}
        for name, times in lowerings.items():
            cells = [f"{1e3 * times[n]:.2f}" for n in rows]
            marked = [
                f"[bold]{c}[/]" if times[n] == best[n] else c
                for c, n in zip(cells, rows, strict=True)
            ]
            table.add_row(kind, name, *marked)
    Console().print(table)
    typer.echo(f"kept in {tuning_file()}")


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of data split, weights and batches.", min=0)] = 0,
    sparsity: Annotated[
        float, typer.Option(help="Fraction of weights to remove.", min=0.0, max=0.99)
    ] = 0.8,
    bits: Annotated[int, typer.Option(help="Bits per weight: 8, 4 or 2.")] = 8,
    epochs: Annotated[
        int, typer.Option(help="Epochs of dense training, and again of pruning.", min=1)
    ] = 8,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the plot.")] = Path(
        "jaxprune-demo"
    ),
) -> None:
    """Train a CNN on 5,000 MNIST images, prune it, quantize it, save it, and print what was gained."""
    if bits not in (8, 4, 2):
        raise typer.BadParameter(f"expected 8, 4 or 2, got {bits}", param_hint="--bits")
    from jaxprune.cli import _demo

    try:
        _demo.run(_demo.Settings(seed, sparsity, bits, epochs, out))
    except (ImportError, FileExistsError, NotADirectoryError) as error:
        typer.secho(f"jaxprune: {error}", err=True, fg="red")
        raise typer.Exit(1) from error


@app.command(hidden=True)
def evaluate(folder: Path, seed: int = 0) -> None:
    """Load a checkpoint of the demo and print its test accuracy as JSON."""
    from jaxprune.cli import _demo

    typer.echo(json.dumps({"accuracy": _demo.evaluate_saved(folder, seed)}))
