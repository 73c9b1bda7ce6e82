"""What tests share: tiny models and runs, scripted judges, readers of what was written."""
