"""The registry of text attacks, by family and name.

Each attack is also made on harmless text. That shows whether the guard reads the request or the
attack.
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
from latentguard.robustness.languages import frame_in_language, languages
from latentguard.robustness.surroundings import (
    chatml_turns,
    request_behind,
    request_in_front,
    spoken_turns,
    system_turn,
    tokens_between,
    tokens_in_front,
    wrap_in_template,
)
from latentguard.study.attacks import TEMPLATES

Transform = Callable[[str, Random], str]
"""Takes a text and a source of randomness, and returns the changed text."""


@dataclass(frozen=True)
class TextAttack:
    """A named change of a text."""

    name: str
    """Unique, of at most 24 characters."""

    family: str
    """Group in the report; ``--only`` takes it, too."""

    transform: Transform
    """Changes a text."""

    @property
    def description(self) -> str:
        """What the attack imitates, and its source, on one line."""
        function = self.transform.func if isinstance(self.transform, partial) else self.transform
        return " ".join((inspect.getdoc(function) or "").split())

    def __call__(self, text: str, *, seed: int = 0) -> str:
        """Return the changed text; randomness depends on seed, attack and text alone."""
        return self.transform(text, Random(f"{seed} {self.name} {text}"))


FAMILIES: dict[str, dict[str, Transform]] = {
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


def _all_attacks() -> Iterator[TextAttack]:
    for family, transforms in FAMILIES.items():
        for name, transform in transforms.items():
            yield TextAttack(name, family, transform)
    for template in TEMPLATES:
        transform = partial(wrap_in_template, template=template.text)
        yield TextAttack(f"wrapper: {template.name}", "wrappers", transform)
    for language in languages():
        yield TextAttack(
            f"frame: {language}", "foreign frames", partial(frame_in_language, language=language)
        )


ATTACKS: tuple[TextAttack, ...] = tuple(_all_attacks())
"""Every text attack but padding, whose length depends on the model."""
