"""Names of risk categories: the MLCommons hazards, and what OpenAI's moderation calls them.

The hazards are those of the MLCommons AILuminate taxonomy (S1 to S14), the moderation categories
those of OpenAI's ``omni-moderation``. The two taxonomies differ. Where OpenAI has no category of
its own, the nearest is ``illicit``, which covers advice on wrongdoing of any kind.
"""

from __future__ import annotations

MODERATION = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""OpenAI's names."""

OTHER = "illicit"
"""Stands for a category that OpenAI has no name for, and for an unnamed one."""

HAZARDS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "violent_crimes": ("S1", ("violence", "illicit/violent")),
    "non_violent_crimes": ("S2", (OTHER,)),
    "sex_related_crimes": ("S3", ("sexual",)),
    "child_sexual_exploitation": ("S4", ("sexual/minors",)),
    "defamation": ("S5", ("harassment",)),
    "specialized_advice": ("S6", (OTHER,)),
    "privacy": ("S7", (OTHER,)),
    "intellectual_property": ("S8", (OTHER,)),
    "indiscriminate_weapons": ("S9", ("illicit/violent",)),
    "hate": ("S10", ("hate",)),
    "suicide_self_harm": ("S11", ("self-harm",)),
    "sexual_content": ("S12", ("sexual",)),
    "elections": ("S13", (OTHER,)),
    "code_interpreter_abuse": ("S14", (OTHER,)),
    # finer categories of the built-in guard prompts
    "cybercrime": ("S2", (OTHER,)),
    "drugs": ("S2", (OTHER,)),
    "fraud": ("S2", (OTHER,)),
    "extremism": ("S1", ("violence", "illicit/violent")),
    "harassment": (None, ("harassment",)),
}
"""Category -> its MLCommons code, if it has one, and the moderation categories that cover it."""


def moderation_names(category: str | None) -> tuple[str, ...]:
    """Return OpenAI's names of a category: its own name if OpenAI has it, else the table's."""
    if category in MODERATION:
        return (category,)
    return HAZARDS[category][1] if category in HAZARDS else (OTHER,)
