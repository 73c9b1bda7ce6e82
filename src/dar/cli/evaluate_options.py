"""Options that several commands of `dar eval` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dar.console import Console

Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same completions and intervals.")
]
Out = Annotated[
    Path, typer.Option(help="Folder of settings, completions and results. Run again to continue.", show_default=False)
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 = the likeliest token every time.")]
Plain = Annotated[bool, typer.Option("--plain", help="Use prompts as they are, without a chat template.")]
NumPrompts = Annotated[int | None, typer.Option(min=1, help="Only the first prompts.", show_default=False)]


def note(text: str) -> None:
    """Progress is for people: results on standard output stay clean."""
    Console(stderr=True).print(text, style="dim")
