"""Figures 4 and 8: refusal of harmless prompts steered along each direction (section 3.4)."""

from latentguard.study.figures.figure_04_steering.collect import Records, collect
from latentguard.study.figures.figure_04_steering.report import analyse

__all__ = ["Records", "analyse", "collect"]
