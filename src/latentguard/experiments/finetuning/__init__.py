"""Figures 7 and 18: what fine-tuning against refusal leaves of the beliefs (section 5.2, H.2).

The openings that are trained on, and the replies of the attacked model, are judged and never shown;
the attacked weights are dropped as soon as they have been looked at.
"""

from latentguard.experiments.finetuning.attacking import Records, collect
from latentguard.experiments.finetuning.looking import Stage
from latentguard.experiments.finetuning.telling import analyse

__all__ = ["Records", "Stage", "analyse", "collect"]
