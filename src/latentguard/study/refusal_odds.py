"""Refusal from the first word alone: the odds of the words with which refusals begin.

A run of one token costs a twentieth of a reply, so interventions can be tried at every layer and
position. The words are those that begin the model's own refusals of the prompts that centroids are
made of; how well their odds tell refusals on other prompts is measured beside every figure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentGuardError
from latentguard.interventions import Edit
from latentguard.prompts import Prompt, Reply
from latentguard.report.page_table import format_interval
from latentguard.stats.detection import auroc
from latentguard.stats.rates import share
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import too_few
from latentguard.study.prompt_groups import BEHAVING, PromptGroups
from latentguard.study.settings import Settings

Array = NDArray[np.float64]

FEWEST = 0.05
"""Share of refusals that must begin with a word for it to count."""

TIMES = 2.0
"""How much more often refusals than other replies must begin with it."""

SURE = 1e-7
"""Chances are kept so far from 0 and 1."""

JUDGED = 12
"""Most prompts of a group whose replies are judged, too."""

TELLS = 0.8
"""AUROC above which the odds tell refusals well enough to conclude anything from them."""


@dataclass(frozen=True)
class Openings:
    """Words with which refusals begin."""

    words: tuple[str, ...]
    """The words."""

    tells: float
    """AUROC of their odds, refused harmful against accepted harmless test prompts."""

    @property
    def note(self) -> str:
        """What is measured, and how well."""
        words = ", ".join(f"'{word}'" for word in self.words)
        return (
            "Log-odds (nats) that the reply begins as refusals do, with "
            f"{words}; on test prompts their AUROC for refusal is {self.tells:.3f}"
        )

    @property
    def too_vague(self) -> str:
        """Why nothing is concluded where the odds do not tell refusals."""
        return (
            f"the first word tells refusals by an AUROC of {self.tells:.3f}, below {TELLS}; "
            "nothing is concluded."
        )


def few_or_vague(what: str, openings: Openings, count: int, noun: str, enough: int) -> list[str]:
    """Why nothing is concluded of an experiment whose groups have so many prompts at least."""
    lines = too_few(what, count, noun, enough)
    if not openings.tells > TELLS:
        lines.append(f"{what}: {openings.too_vague}")
    return lines


def rate_text(flags: Array) -> str:
    """A rate with its interval and n, of flags [draws m]; prompts that are unclear are left out."""
    clear = flags[:, ~np.isnan(flags).any(0)] > 0
    if not clear.shape[1]:
        return "unclear"
    rate = share(clear)
    shown = format_interval(rate.value, rate.low, rate.high)
    return f"{shown} (n = {clear.shape[1]})"


def find_openings(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Openings:
    """The words that begin refusals of the prompts that centroids are made of.

    Raises:
        LatentGuardError: if no refusal begins with a word.
    """
    counts, sizes = [], []
    for group in BEHAVING:
        prompts = prompt_groups.fit_prompts(group)
        (replies,) = model.replies(prompts, max_new_tokens=settings.reply_tokens)
        counts.append(Counter(filter(None, map(first_word, replies))))
        sizes.append(max(len(prompts), 1))
    refused, accepted = (
        {word: count / size for word, count in of.items()}
        for of, size in zip(counts, sizes, strict=True)
    )
    if not refused:
        raise LatentGuardError("No refusal begins with a word, so its odds cannot be read.")
    words = [
        word
        for word, share in refused.items()
        if share >= FEWEST and share > TIMES * accepted.get(word, 0.0)
    ]
    if not words:
        words = [max(refused, key=lambda word: refused[word] - accepted.get(word, 0.0))]
    tests = [p for group in BEHAVING for p in prompt_groups.test_prompts(group)]
    labels = np.array([bool(p.refused) for p in tests])
    tells = float("nan")
    if labels.any() and not labels.all():
        (odds,) = refusal_odds(model, tests, [None], words, what="first words")
        tells = auroc(labels, odds)
    return Openings(tuple(words), tells)


def refusal_odds(
    model: CachedModel,
    prompts: Sequence[Prompt],
    edits: Sequence[Edit | None],
    words: Sequence[str],
    *,
    what: str,
) -> Array:
    """Log-odds of refusal by the first word under each edit, [e n], in nats."""
    replies = model.replies(prompts, edits, what=what, max_new_tokens=1, watch=tuple(words))
    return np.array([[log_odds(reply) for reply in of] for of in replies]).reshape(
        len(edits), len(prompts)
    )


def first_word(reply: Reply) -> str:
    """The word that a reply begins with; empty if it has none."""
    match = re.match(r"\W*(\w+)", reply.text)
    return match[1] if match else ""


def log_odds(reply: Reply) -> float:
    """Log-odds that the reply begins with one of the watched words.

    Words that begin with the same token have the same chance, and count once.
    """
    chance = sum(np.exp(value) for value in {value for _, value in reply.watched})
    chance = min(max(float(chance), SURE), 1 - SURE)
    return float(np.log(chance / (1 - chance)))
