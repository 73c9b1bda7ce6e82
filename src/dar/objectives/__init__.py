"""Objectives: pure functions from log-probabilities and fixed per-row quantities to unreduced losses."""
