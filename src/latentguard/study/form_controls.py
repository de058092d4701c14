"""What form alone gives: the controls behind *replicated, but form explains it*.

Three controls of a score that should tell harmful prompts from harmless ones:

- **Form alone**: n-grams with the ending, form and length of a text, learnt from the centroids' own
  prompts. No model is asked.
- **Form-matched prompts**: pairs of a harmful and a harmless prompt of equal form.
- **The sealed reading**: the ending of every prompt is made uniform, in the centroids too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentguard.data.surface_audit import ending_class, form_class, ngram_scores
from latentguard.prompts import Prompt
from latentguard.states import Reading
from latentguard.stats.detection import combine_areas
from latentguard.stats.estimate import Estimate
from latentguard.study.prompt_groups import PromptGroups, sample_prompts
from latentguard.study.settings import Settings

Wins = NDArray[np.float64]
"""``detection.win_matrix`` of harmful over harmless prompts, [n m]."""

ENDINGS = {".": "stop", "?": "question", "!": "exclamation", "word": "word", "other": "other"}


def form_scores(fitted: Sequence[Prompt], tested: Sequence[Prompt]) -> NDArray[np.float64]:
    """How harmful prompts look by form alone, learnt from labelled prompts, [n].

    Raises:
        GuardError: if a label is missing among the fitted prompts.
    """
    return ngram_scores([_with_shape(p) for p in fitted], [_with_shape(p) for p in tested])


def matched_prompts(prompt_groups: PromptGroups, settings: Settings) -> tuple[Prompt, ...]:
    """Form-matched prompts of both labels that no centroid saw, nor their twins."""
    free = unseen_matched(prompt_groups)
    sides = ([p for p in free if p.harmful is side] for side in (True, False))
    return tuple(
        p for side in sides for p in sample_prompts(side, settings.test, seed=settings.seed)
    )


def matched_pairs(prompt_groups: PromptGroups, most: int) -> list[tuple[Prompt, Prompt]]:
    """At most so many form-matched pairs, a harmful and a harmless twin, that no centroid saw."""
    sides: dict[bool, dict[str, Prompt]] = {True: {}, False: {}}
    for prompt in unseen_matched(prompt_groups):
        if prompt.pair and prompt.harmful is not None:
            sides[prompt.harmful].setdefault(prompt.pair, prompt)
    both = [p for pair, p in sides[True].items() if pair in sides[False]]
    sample = sample_prompts(both, most)
    return [(p, sides[False][str(p.pair)]) for p in sample]


def unseen_matched(prompt_groups: PromptGroups) -> list[Prompt]:
    """All form-matched prompts that no centroid saw, nor their twins."""
    fitted = [p for group in prompt_groups.fit.values() for p in group]
    training = ({p.text for p in fitted} | {p.pair for p in fitted}) - {None}
    return [p for p in prompt_groups.pools.matched if not training & {p.text, p.pair}]


def seal(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """The prompts with uniform endings."""
    return tuple(map(Reading.of("sealed", 1).prepare, prompts))


def sealed_groups(prompt_groups: PromptGroups) -> PromptGroups:
    """The groups with uniform endings in what the centroids are made of."""
    fit = {group: seal(prompts) for group, prompts in prompt_groups.fit.items()}
    return replace(prompt_groups, fit=fit)


def kept_beyond_half(matched: Sequence[Wins], own: Sequence[Wins]) -> Estimate:
    """How much more than half of a separation is left on form-matched prompts.

    (A - 0.5) - (B - 0.5) / 2, where A is the mean AUROC of the form-matched sets and B that of the
    claim's own. 0 or less: form may explain at least half.
    """
    factors = [1.0 / len(matched)] * len(matched) + [-0.5 / len(own)] * len(own)
    return combine_areas([*matched, *own], factors, constant=-0.25)


def beyond_form(belief: Sequence[Wins], by_form: Sequence[Wins]) -> Estimate:
    """AUROC of a score less that of form alone, mean over sets, on the same prompts."""
    gaps = [one - other for one, other in zip(belief, by_form, strict=True)]
    return combine_areas(gaps, [1.0 / len(gaps)] * len(gaps), undecided=0.0)


def _with_shape(prompt: Prompt) -> Prompt:
    """The prompt with words that name its ending, its form and its length."""
    text = prompt.text
    length = int(np.log2(1 + len(text.split())))
    shape = f"ending{ENDINGS[ending_class(text)]} form{form_class(text)} length{length}"
    return replace(prompt, text=f"{text} {shape}")
