"""Figures 5 and 10 to 12, Tables 2, 6 and 7: the reply inversion task (section 3.5, appendix E).

A harmful instruction is to be answered by 'Certainly', a harmless one by 'No': so a model that is
made to believe something else says the other word, and one that is made to refuse need not.
"""

from latentguard.study.figures.figure_05_inversion.collect import Records, collect
from latentguard.study.figures.figure_05_inversion.report import analyse

__all__ = ["Records", "analyse", "collect"]
