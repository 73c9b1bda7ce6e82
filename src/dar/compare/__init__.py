"""One recipe, several methods, learning rates and seeds: run what is missing, put the finished runs side by side."""

from dar.compare.arms import Arm, at_learning_rates, parse_arms
from dar.compare.runs import Outcome, run_all
from dar.compare.summary import plot_frontier, summarize

__all__ = ["Arm", "Outcome", "at_learning_rates", "parse_arms", "plot_frontier", "run_all", "summarize"]
