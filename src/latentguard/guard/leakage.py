"""Leakage: prompts that a guard or a pack was trained on do not calibrate it.

Their scores lie lower, or higher, than those of the traffic to come, and a threshold that is picked
on them promises too much. A guard keeps their digests, never their texts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from latentguard.errors import GuardError
from latentguard.prompts import Prompt

MAX_SHARE = 0.1
"""Share of the texts of a label that may happen to be among those that a guard was fitted on."""

NEGLIGIBLE_SHARE = 0.05
"""Up to this share of prompts is left out without thinning the texts that both halves hold."""


def prompt_digest(prompt: Prompt) -> int:
    """A digest of what was said, in 63 bits."""
    texts = [prompt.text, *(part for m in prompt.history for part in (m.role, m.content))]
    return text_digest("\0".join(texts))


def text_digest(text: str) -> int:
    """A digest of a text, in 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class TrainingPrompts:
    """Digests of the user's harmless prompts that packs were trained on."""

    alone: frozenset[int] = frozenset()
    """Of texts that occur among the training prompts alone."""

    shared: frozenset[int] = frozenset()
    """Of texts that occur among the user's other prompts, too."""

    @staticmethod
    def of(training: Iterable[Prompt], others: Iterable[Prompt]) -> TrainingPrompts:
        """From the prompts that were trained on, and the others."""
        one = set(map(prompt_digest, training))
        other = set(map(prompt_digest, others))
        return TrainingPrompts(frozenset(one - other), frozenset(one & other))

    def __or__(self, other: TrainingPrompts) -> TrainingPrompts:
        """Both; a text that one had alone is alone."""
        alone = self.alone | other.alone
        return TrainingPrompts(alone, (self.shared | other.shared) - alone)


def exclude_training_prompts(
    prompts: Iterable[Prompt], training: TrainingPrompts
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that must not calibrate, and those that may, each in order.

    Prompts that were trained on are left out, because their scores are too low.

    - A text that occurs only among the training prompts is always left out.
    - A text that occurs in both halves is left out as often as the other texts are, so that its
      share stays the same: one that is asked again and again scores then as it does now.
    """
    rows = list(prompts)
    digests = {n: prompt_digest(prompt) for n, prompt in enumerate(rows) if not prompt.harmful}
    excluded = {n for n, digest in digests.items() if digest in training.alone}
    shared = [n for n, digest in digests.items() if digest in training.shared]
    if len(excluded) > NEGLIGIBLE_SHARE * len(digests):
        share = len(excluded) / (len(digests) - len(shared))
        excluded |= set(random.Random(0).sample(shared, round(share * len(shared))))
    left_out = [prompt for n, prompt in enumerate(rows) if n in excluded]
    return left_out, [prompt for n, prompt in enumerate(rows) if n not in excluded]


def require_unseen(prompts: Sequence[Prompt], digests: Iterable[int], min_segment: int = 1) -> None:
    """Refuse to calibrate on what a guard was fitted on.

    Texts are counted, not rows: one that is often asked scores then as it does now.

    Args:
        prompts: What is to calibrate.
        digests: Of what the guard was fitted on.
        min_segment: Prompts that a segment needs for a threshold of its own.

    Raises:
        GuardError: if more than ``MAX_SHARE`` of the texts of a label or of a segment, and more
            than two, are among them.
    """
    training = set(digests)
    harmless = [p for p in prompts if not p.harmful]
    groups = {"harmless": harmless, "harmful": [p for p in prompts if p.harmful]}
    for segment in dict.fromkeys(p.segment for p in harmless if p.segment):
        own = [p for p in harmless if p.segment == segment]
        if len(own) >= min_segment:
            groups[f"harmless (segment '{segment}')"] = own
    for name, group in groups.items():
        require_few_seen(map(prompt_digest, group), training, f"{name} prompts")


def require_few_seen(digests: Iterable[int], training: set[int], what: str) -> None:
    """Refuse texts of which more than ``MAX_SHARE``, and more than two, were trained on.

    Args:
        digests: Of the texts.
        training: Of what was trained on.
        what: Names the texts in the error.

    Raises:
        GuardError: if there are too many.
    """
    texts = set(digests)
    overlap = len(texts & training)
    if overlap > max(2, MAX_SHARE * len(texts)):
        raise GuardError(
            f"{overlap} of the {len(texts)} different {what} to calibrate on are among those that "
            "the guard was fitted on, whose scores would promise too much; give others of the same "
            "kind."
        )
