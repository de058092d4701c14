"""Beyond the paper: both beliefs along the reply. Is harm believed while the model complies?"""

from latentguard.study.figures.beyond_replies.changes import Records
from latentguard.study.figures.beyond_replies.collect import READINGS, collect
from latentguard.study.figures.beyond_replies.report import analyse

__all__ = ["READINGS", "Records", "analyse", "collect"]
