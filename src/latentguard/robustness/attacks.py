"""Every change of text, by family and name, as data.

The same change is made to harmless text, which shows what is read there: the request or the change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

from latentguard.robustness.characters import (
    base64_text,
    bidi_marks,
    bidi_override,
    fullwidth,
    homoglyphs,
    joined_words,
    leetspeak,
    random_case,
    rot13,
    scrambled_letters,
    spaced_letters,
    upper_case,
    zero_width,
)
from latentguard.robustness.languages import framed, languages
from latentguard.robustness.surroundings import (
    chatml_turns,
    request_behind,
    request_in_front,
    spoken_turns,
    system_turn,
    tokens_between,
    tokens_in_front,
    wrapped,
)
from latentguard.study.attacks import TEMPLATES

Change = Callable[[str, Random], str]
"""A text, and where chance comes from -> the changed text."""


@dataclass(frozen=True)
class Attack:
    """A change of text, with its name."""

    name: str
    """Unique, of at most 24 characters."""

    family: str
    """What it is shown with; ``--only`` takes it, too."""

    change: Change
    """What is done to a text."""

    @property
    def about(self) -> str:
        """What it imitates, and the source, on one line."""
        function = self.change.func if isinstance(self.change, partial) else self.change
        return " ".join((inspect.getdoc(function) or "").split())

    def __call__(self, text: str, *, seed: int = 0) -> str:
        """The changed text; chance depends on the seed, the attack and the text alone."""
        return self.change(text, Random(f"{seed} {self.name} {text}"))


FAMILIES: dict[str, dict[str, Change]] = {
    "special tokens": {"tokens in front": tokens_in_front, "tokens between": tokens_between},
    "template imitation": {
        "ChatML turns behind": chatml_turns,
        "system turn in front": system_turn,
        "spoken turns behind": spoken_turns,
    },
    "homoglyphs": {
        "homoglyphs, a third": partial(homoglyphs, share=1 / 3),
        "homoglyphs, all": homoglyphs,
        "fullwidth": fullwidth,
    },
    "unseen characters": {
        "zero width": zero_width,
        "bidi override": bidi_override,
        "bidi marks": bidi_marks,
    },
    "case and spacing": {
        "random case": random_case,
        "upper case": upper_case,
        "spaced letters": spaced_letters,
        "joined words": joined_words,
        "scrambled letters": scrambled_letters,
    },
    "encodings": {"base64": base64_text, "rot13": rot13, "leetspeak": leetspeak},
    "two requests": {
        "harmless request behind": request_behind,
        "harmless one in front": request_in_front,
    },
}


def _attacks() -> Iterator[Attack]:
    for family, changes in FAMILIES.items():
        for name, change in changes.items():
            yield Attack(name, family, change)
    for template in TEMPLATES:
        change = partial(wrapped, template=template.text)
        yield Attack(f"wrapper: {template.name}", "wrappers", change)
    for language in languages():
        yield Attack(f"frame: {language}", "foreign frames", partial(framed, language=language))


ATTACKS: tuple[Attack, ...] = tuple(_attacks())
"""Every change of text but padding, whose length depends on the model."""
