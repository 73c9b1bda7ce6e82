"""Data: tables of rows, prompts made of them, and the order they are drawn in."""

from dar.data.prompts import PromptSet, PromptStream, prepare_prompts
from dar.data.sources import load_rows

__all__ = ["PromptSet", "PromptStream", "load_rows", "prepare_prompts"]
