"""Policies that are flow-matching models: a completion is a trajectory of denoising steps."""
