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
