"""Figure 6: what a model believes while it is jailbroken (section 4)."""

from latentguard.study.figures.figure_06_jailbreaks.jailbreaks import Records, analyse, collect

__all__ = ["Records", "analyse", "collect"]
