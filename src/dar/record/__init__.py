"""What a run writes down and is judged by: its folder, its metrics, completions and alerts."""
