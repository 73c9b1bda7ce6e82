"""Sampling trajectories of a flow-matching model."""
