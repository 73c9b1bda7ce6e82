"""One recipe, several methods, learning rates and seeds: run what is missing, put the finished runs side by side."""
