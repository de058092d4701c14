"""Figures 7 and 18: what fine-tuning against refusal leaves of the beliefs (section 5.2, H.2).

The openings that are trained on, and the replies of the attacked model, are judged and never shown;
the attacked weights are dropped as soon as they have been looked at.
"""

from latentguard.study.figures.figure_07_finetuning.collect import Records, collect
from latentguard.study.figures.figure_07_finetuning.report import analyse
from latentguard.study.figures.figure_07_finetuning.snapshot import Stage

__all__ = ["Records", "Stage", "analyse", "collect"]
