"""Tables 3, 8 and 9: Latent Guard beside baseline guards (section 5.1, appendix H)."""

from latentguard.study.figures.table_03_guards.guards import Records, analyse, collect

__all__ = ["Records", "analyse", "collect"]
