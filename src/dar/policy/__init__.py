"""Policies: where models come from, how their log-probabilities are computed, how they are saved."""
