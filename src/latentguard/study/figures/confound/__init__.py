"""The confound page: what surface form gives away, and each headline number again without it."""

from latentguard.study.figures.confound.collect import Records, collect
from latentguard.study.figures.confound.report import analyse

__all__ = ["Records", "analyse", "collect"]
