"""Rollouts: sampling completions from the current policy."""
