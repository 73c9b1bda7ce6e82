"""Code that is not ours, in processes of its own: bounded in time and memory, and never with our secrets."""
