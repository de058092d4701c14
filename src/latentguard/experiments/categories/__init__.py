"""Figures 9 and 17: directions of risk categories, and steering with each of them (appendix D)."""

from latentguard.experiments.categories.comparing import Records, analyse, collect
from latentguard.experiments.categories.steering import Steered

__all__ = ["Records", "Steered", "analyse", "collect"]
