"""The root command: all commands by purpose, the options they share, and errors as one paragraph."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from dar import __version__
from dar.cli.compare import compare
from dar.cli.control import control
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
from dar.console import Console, show_logs
from dar.errors import EXTRAS, ConfigError, DarError
from dar.files.hints import nearest_hint
from dar.files.imports import raised_at
from dar.shown import words

app = typer.Typer(
    name="dar",
    help="Align a language model online, and know what the run did. First: dar init FOLDER, then dar train RECIPE.",
    no_args_is_help=True,
    rich_markup_mode=None,  # whose tables cut words off where the terminal is narrow, and read brackets as markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dar {__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere on the line.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of every command."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand not in ("train", "reward-model"):
        raise ConfigError(f"dar {context.invoked_subcommand} runs in one process: start it without a launcher")
    # What the first of a machine's ranks warns of, all do.
    show_logs(logging.WARNING if _is_first else logging.ERROR)
    _settings["debug"] = debug


_settings = {"debug": False}
_is_first = os.environ.get("LOCAL_RANK", "0") == "0"

for command in (init, schema, plan, train, compare, reward_model, control):
    app.command()(command)
app.add_typer(eval_app, short_help=eval_app.info.help)
for command in (ls, sample, judge, report, watch, export):
    app.command()(command)
for entry in (*app.registered_commands, *eval_app.registered_commands):
    entry.short_help = (entry.callback.__doc__ or "").partition("\n\n")[0]  # whole: typer would cut it off


def main() -> None:
    """Entry point: an error the library raises on purpose, or code of one's own, is one paragraph and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows no π is no reason to lose a result.
            stream.reconfigure(errors="backslashreplace")
    line = sys.argv[1:]
    end = line.index("--") if "--" in line else len(line)
    if "--debug" in line[:end]:
        line = ["--debug", *(part for part in line[:end] if part != "--debug"), *line[end:]]
    try:
        code = app(line, prog_name="dar", standalone_mode=False) or 0
        if code == 130:  # of a Ctrl-C, which typer has caught
            raise KeyboardInterrupt
        _leave(code)
    except KeyboardInterrupt:
        _leave(130, "interrupted" if _is_first else "")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            error = ConfigError(f"this needs the package {error.name}: pip install 'dar-rlhf[{EXTRAS[error.name]}]'")
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message(), err=True)  # pyright: ignore[reportAttributeAccessIssue]
            sys.exit(2)
        if hasattr(error, "format_message"):  # typer's, of the line itself
            error = ConfigError(_explained(error, line))
        place, hint = raised_at(error), "\n--debug shows the traceback."
        if isinstance(error, DarError) and not _settings["debug"]:
            kind = "" if isinstance(error, ConfigError) else f" ({type(error).__name__})"
            hint = hint if error.__cause__ and raised_at(error.__cause__) else ""
            if error.is_elsewhere:
                _leave(2, patience=6)
            _leave(2, f"dar{kind}: {error}{hint}", patience=None if error.is_elsewhere is None else 0)
        if place and not _settings["debug"]:
            _leave(2, f"dar: {type(error).__name__}: {words(error)}{place}{hint}")
        # Python would print what the error quotes as it is.
        _leave(1, traceback.format_exc())


def _leave(code: int, text: str = "", *, patience: float | None = None) -> NoReturn:
    """Says what went wrong and exits.

    Of several ranks one says it, before the launcher ends it because another has ended. What one says for all it says
    at once, and the others wait longer than that takes. Else mostly the first of a machine meets what all meet: the
    others wait for the launcher to end them, and speak up where that does not come.

    Args:
        code: of the exit.
        text: what went wrong, if it is for this rank to say.
        patience: seconds to wait first; by default as it is with an error that ranks have not compared.
    """
    if patience is None:
        patience = 0 if _is_first or not code else 3 if text else 6
    if patience:
        with suppress(KeyboardInterrupt):
            time.sleep(patience)
    if text:
        Console(stderr=True).print(text, soft_wrap=True)
    sys.exit(code)


def _explained(error: Any, line: list[str]) -> str:
    """What typer says is wrong with a line; an option that is a key of recipes is shown as one."""
    said, command = error.format_message(), error.ctx.command if error.ctx else None
    if (parameter := getattr(error, "param", None)) and isinstance(getattr(parameter, "help", None), str):
        said += f" ({parameter.help})"
    if command and type(error).__name__ == "NoSuchOption":
        option = error.option_name
        near = nearest_hint(option, {name for parameter in command.params for name in parameter.opts})
        said = f"there is no option {option}{near}"
        if not near and any(parameter.name == "overrides" for parameter in command.params):
            given = next(index for index, part in enumerate(line) if part.startswith(option[:2]))
            _, is_joined, value = line[given].partition("=")
            value = value if is_joined else (*line[given + 1 :], "…")[0]
            said += f": keys of the recipe are written {option.lstrip('-').replace('-', '_')}={value}"
    return f"{said}\nSee {error.ctx.command_path if error.ctx else 'dar'} --help" if said else "see dar --help"
