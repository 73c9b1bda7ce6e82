"""One run: the loop, what it collects and records, its folder, its held-out evaluation, its alerts."""
