"""Control: SAC by stable-baselines3 on uncertain dynamics, with layers of a rank that adapts (AdaRL)."""
