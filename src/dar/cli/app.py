"""The root command: all commands by purpose, the options they share, and errors as one paragraph."""

from __future__ import annotations

import io
import logging
import sys
import traceback
import warnings
from typing import Annotated

import typer

from dar import __version__
from dar.cli.compare import compare
from dar.cli.evaluate import eval_app
from dar.cli.export import export
from dar.cli.init import init
from dar.cli.judge import judge
from dar.cli.ls import ls
from dar.cli.report import report, watch
from dar.cli.reward_model import reward_model
from dar.cli.sample import sample
from dar.cli.schema import schema
from dar.cli.train import plan, train
from dar.console import Console, LogHandler
from dar.errors import EXTRAS, ConfigError, DarError

app = typer.Typer(
    name="dar",
    help="Align a language model online, and know what the run did. First: dar init FOLDER, then dar train RECIPE.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dar {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogHandler()])
    logging.captureWarnings(True)
    # What libraries tell those who call them of their next release; no recipe can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    _settings["debug"] = debug


_settings = {"debug": False}

for command in (init, schema, plan, train, compare, reward_model):
    app.command(rich_help_panel="Train")(command)
app.add_typer(eval_app, rich_help_panel="Evaluate")
for command in (ls, sample, judge, report, watch, export):
    app.command(rich_help_panel="Evaluate")(command)


def main() -> None:
    """Entry point: an error the library raises on purpose becomes one paragraph and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows no π is no reason to lose a result.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            error = ConfigError(f"this needs the package {error.name}: pip install 'dar-rlhf[{EXTRAS[error.name]}]'")
        if isinstance(error, DarError) and not _settings["debug"]:
            kind = "" if isinstance(error, ConfigError) else f" ({type(error).__name__})"
            Console(stderr=True).print(f"dar{kind}: {error}", soft_wrap=True)
            sys.exit(2)
        # Python would print what the error quotes as it is.
        Console(stderr=True).print(traceback.format_exc(), soft_wrap=True)
        sys.exit(1)
