"""The models that are trained: what the learner may know of one, and a folder per kind."""
