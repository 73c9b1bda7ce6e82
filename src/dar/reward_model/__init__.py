"""Reward models: training one on preference pairs, what held-out pairs say of it, and its scores as a reward."""
