"""The `jaxprune` command."""

import sys


def main() -> None:
    """Runs the command line; says what to install where its packages are missing."""
    try:
        from jaxprune.cli._app import app
    except ImportError as error:
        sys.exit(f'jaxprune: {error.name} is missing: pip install "jaxprune[cli]"')
    app()


__all__ = ["main"]
