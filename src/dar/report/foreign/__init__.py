"""Runs in other libraries' own formats, read as they are."""
