"""Data: tables of rows, prompts and logged completions made of them, and the order they are drawn in."""
