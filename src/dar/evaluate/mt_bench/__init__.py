"""MT-Bench: questions of two turns, each answer rated by a judging model (Zheng et al. 2023, arXiv:2306.05685)."""
