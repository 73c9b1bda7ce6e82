"""One run: the loop, what it collects and records, its held-out evaluation, the best policy."""
