"""Figure 6: what a model believes while it is jailbroken, and what the wrapper adds (section 4)."""

from latentguard.study.figures.figure_06_jailbreaks.collect import Records, collect
from latentguard.study.figures.figure_06_jailbreaks.report import analyse

__all__ = ["Records", "analyse", "collect"]
