"""The command line: a module per command."""

from dar.cli.app import app, main

__all__ = ["app", "main"]
