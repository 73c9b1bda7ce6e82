"""A run on a Ray cluster: its learners, samplers and reward workers as actors."""
