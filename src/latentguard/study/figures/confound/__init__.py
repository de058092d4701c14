"""The confound page: what surface form gives away, and each headline number again without it."""

from latentguard.study.figures.confound.confound import Records, analyse, collect

__all__ = ["Records", "analyse", "collect"]
