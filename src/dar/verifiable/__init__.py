"""Answers that can be checked: mathematics and instructions. Pure functions of texts, for rewards and evaluations."""

from dar.verifiable.ifeval import as_list, check_instructions, read_instructions
from dar.verifiable.maths import final_answer, gold_text, is_correct

__all__ = ["as_list", "check_instructions", "final_answer", "gold_text", "is_correct", "read_instructions"]
