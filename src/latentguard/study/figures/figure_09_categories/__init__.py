"""Figures 9 and 17: directions of risk categories, and steering with each of them (appendix D)."""

from latentguard.study.figures.figure_09_categories.collect import Records, collect
from latentguard.study.figures.figure_09_categories.report import analyse
from latentguard.study.figures.figure_09_categories.steering import Steered

__all__ = ["Records", "Steered", "analyse", "collect"]
