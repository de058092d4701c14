"""Tables 3, 8 and 9: Latent Guard beside baseline guards (section 5.1, appendix H)."""

from latentguard.study.figures.table_03_guards.collect import Records, collect
from latentguard.study.figures.table_03_guards.report import analyse

__all__ = ["Records", "analyse", "collect"]
