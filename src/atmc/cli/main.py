"""The ``atmc`` command: find the command that was asked for, and turn errors into sentences and an exit status."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from atmc.cli.bench import bench
from atmc.cli.compress import compress
from atmc.cli.evaluate import evaluate
from atmc.cli.export import export
from atmc.cli.inspect import inspect
from atmc.cli.options import Command
from atmc.cli.table import table
from atmc.cli.verify import verify
from atmc.core.version import __version__

# The modules that are imported here do not load torch: each command imports what it needs of atmc inside its functions,
# so that help, --version and wrong arguments are answered at once. tests/cli/test_start.py checks it.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
UsageError: Any = typer.BadParameter.__bases__[0]  # of the click that typer uses, which may be its own copy
_TYPER_INTERRUPTED = 130  # the status typer returns after Ctrl-C; older versions raise Abort

for command in (compress, evaluate, verify, inspect, export, bench, table):
    app.command(cls=Command)(command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"atmc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make image classifiers that are small and hard to fool at once."""


def main() -> None:
    """Run the command. The exit status is 0 if it is done, 2 if the user's input was wrong, 1 for anything else."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
        if status == _TYPER_INTERRUPTED:
            raise typer.Abort
        sys.exit(status)
    except UsageError as error:
        print(f"atmc: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        print("atmc: interrupted", file=sys.stderr)
        sys.exit(1)
    except ValueError as error:
        print(f"atmc: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        print(f"atmc: {file}{error.strerror or error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) else 1)
    except RuntimeError as error:
        print(f"atmc: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
