"""Figures 9 and 17: directions of risk categories, and steering with each of them (appendix D)."""

from latentguard.study.figures.figure_09_categories.compare import Records, analyse, collect
from latentguard.study.figures.figure_09_categories.steering import Steered

__all__ = ["Records", "Steered", "analyse", "collect"]
