"""Answers that can be checked: mathematics and instructions. Pure functions of texts, for rewards and evaluations."""
