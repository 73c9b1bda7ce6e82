"""Language models as policies: where they come from, how their log-probabilities are computed, how they are saved."""
