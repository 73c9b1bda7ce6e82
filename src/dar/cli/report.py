"""`dar report` and `dar watch`: what runs did, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dar.cli.common import AsJson, print_json
from dar.console import Console
from dar.errors import ConfigError
from dar.files.atomic import write_text
from dar.files.paths import expanded

Runs = Annotated[
    list[Path],
    typer.Argument(
        help="Run folders, TRL's output folders or verl's dumps; the --out of dar compare stands for its runs.",
        show_default=False,
    ),
]


def report(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The HTML file; else RUN/report.html, of several runs report.html.", show_default=False
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Also write each plot as a PNG into this folder.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what one run did, or how several compare, as one HTML file that needs no network."""
    from dar.report.kinds import RewardModelRun
    from dar.report.page import render_page
    from dar.report.png import write_pictures
    from dar.report.record import record
    from dar.report.run import load_trainings

    found = load_trainings(runs)
    only = found if isinstance(found, RewardModelRun) else found[0] if len(found) == 1 else None
    target = Path(expanded(out or (only.path / "report.html" if only else "report.html")))
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: -o is the file to write, such as {target / 'report.html'}")
    page = render_page(found)
    write_text(target, page)
    console = Console(stderr=as_json)
    console.print(f"{target.resolve().as_uri()} ({len(page.encode()) / 1e6:.1f} MB)", soft_wrap=True)
    if png is not None:
        written = write_pictures(found, Path(expanded(png)))
        console.print(f"{len(written)} pictures in {png}", soft_wrap=True)
    if as_json:
        print_json({"report": str(target)} | record(found))


def watch(
    runs: Runs,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Whoever can reach it can read the run: there is no password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8317,
) -> None:
    """Serve the report to a browser on this machine and refresh it while the run goes on; Ctrl-C ends it."""
    from dar.report.run import load_trainings
    from dar.report.server import ReportServer

    load_trainings(runs)  # what is wrong with a folder is said here, not in the browser
    console = Console()
    with ReportServer(runs, host, port) as server:
        console.print(f"{server.url}   (Ctrl-C ends it)", soft_wrap=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("stopped")
