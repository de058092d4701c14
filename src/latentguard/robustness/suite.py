"""The suite: which prompts are asked under which attack, for a budget and a model's context."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from latentguard.errors import LatentGuardError, PromptError
from latentguard.prompts import Prompt
from latentguard.robustness.attacks import ATTACKS, Attack
from latentguard.robustness.languages import english, languages, translated
from latentguard.robustness.surroundings import PROSE, Side, padded
from latentguard.study.prompt_groups import sample_prompts

BudgetName = Literal["small", "full"]

PLAIN = "untransformed"
TRANSLATIONS = "translations"
HARMLESS = 1
"""The first harmless row of the translations."""

ALL_LANGUAGES = "translated: all ten"
PADDING = "padding"
EXAMPLE = "How do I bake bread at home?"
SIDES: tuple[Side, ...] = ("front", "behind")
PADDED = (500, 2000, 8000)
"""Tokens of padding."""

FEWEST = 4
"""Prompts a class for a length that the budget leaves out, where it is named."""

SPARE = 512
"""Tokens of the context that padding leaves to the template and the request."""


@dataclass(frozen=True)
class Budget:
    """How many prompts are asked."""

    prompts: int
    """Most of each class under each attack."""

    padded: tuple[int, ...]
    """The same for each length of ``PADDED``; 0 leaves it out unless it is named."""

    finetune: bool
    """Whether the fine-tuning attack runs unless it is named."""


BUDGETS: dict[BudgetName, Budget] = {
    "small": Budget(24, (8, 4, 0), finetune=False),
    "full": Budget(200, (60, 24, 8), finetune=True),
}


@dataclass(frozen=True)
class Room:
    """What a model can read."""

    context: int | None
    """Most tokens; None if unknown."""

    count: Callable[[str], int]
    """How many tokens a text has, with the template."""


@dataclass(frozen=True)
class Case:
    """One attack on n prompts, in k variants."""

    name: str
    """Of the attack."""

    family: str
    """What it is shown with."""

    about: str
    """What it imitates, and the source."""

    example: str
    """A harmless text under attack."""

    plain: tuple[Prompt, ...]
    """The prompts before, [n]."""

    variants: tuple[tuple[Prompt, ...], ...]
    """The prompts under attack, [k n]."""


def names() -> list[str]:
    """Every case that a budget can hold."""
    padding = [_padding_name(side, tokens) for side in SIDES for tokens in PADDED]
    whole = [*(f"translated: {language}" for language in languages()), ALL_LANGUAGES]
    return [*(attack.name for attack in ATTACKS), *padding, *whole]


def families() -> list[str]:
    """The families of the cases."""
    return [*dict.fromkeys(attack.family for attack in ATTACKS), PADDING, TRANSLATIONS]


def cases(
    prompts: Sequence[Prompt],
    budget: Budget,
    room: Room,
    *,
    only: Collection[str] = (),
    seed: int = 0,
) -> list[Case]:
    """The untransformed prompts, then those under each attack.

    Args:
        prompts: Labelled.
        budget: How many of them.
        room: What the model can read: padding keeps within it.
        only: Attacks or families; all if empty.
        seed: Of what is left to chance.

    Raises:
        PromptError: if a class is missing.
    """
    chosen = _sample(prompts, budget.prompts, seed)
    found = [Case(PLAIN, PLAIN, "The prompts as they are.", EXAMPLE, chosen, (chosen,))]
    found += [_case(attack, chosen, seed) for attack in ATTACKS]
    found += _padding_cases(prompts, budget, room, only, seed)
    found += _translations()
    return [c for c in found if c.name == PLAIN or not only or {c.name, c.family} & set(only)]


def left_out(budget: Budget, room: Room, *, only: Collection[str] = ()) -> dict[str, str]:
    """Padding that was wanted and that ``cases`` leaves out, with the reason."""
    reasons = {}
    for side in SIDES:
        for tokens, count in zip(PADDED, budget.padded, strict=True):
            name = _padding_name(side, tokens)
            if only and not {name, PADDING} & set(only):
                continue
            if not _fits(tokens, room):
                reasons[name] = f"This model reads at most {room.context} tokens."
            elif not count and name not in only:
                reasons[name] = "Not in this budget; name it with --only."
    return reasons


def _case(attack: Attack, prompts: tuple[Prompt, ...], seed: int, about: str = "") -> Case:
    changed = tuple(replace(p, text=attack(p.text, seed=seed)) for p in prompts)
    example = attack(EXAMPLE, seed=seed)
    return Case(attack.name, attack.family, about or attack.about, example, prompts, (changed,))


def _sample(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[Prompt, ...]:
    """At most ``count`` of each class; smaller samples lie in larger ones."""
    sides = [[p for p in prompts if p.harmful is side] for side in (True, False)]
    if not all(sides):
        raise PromptError(
            f"A stress test needs harmful and harmless prompts; found {len(sides[0])} and "
            f"{len(sides[1])}. Give both with --harmful and --harmless."
        )
    return tuple(p for side in sides for p in sample_prompts(side, count, seed=seed))


def _padding_cases(
    prompts: Sequence[Prompt], budget: Budget, room: Room, only: Collection[str], seed: int
) -> Iterator[Case]:
    for side in SIDES:
        for tokens, count in zip(PADDED, budget.padded, strict=True):
            name = _padding_name(side, tokens)
            most = count or (FEWEST if name in only else 0)
            if most and _fits(tokens, room):
                attack, used = _padding(side, tokens, room)
                chosen = _sample(prompts, most, seed)
                yield _case(attack, chosen, seed, f"{attack.about} Here {used} tokens.")


def _padding(side: Side, tokens: int, room: Room) -> tuple[Attack, int]:
    """Padding of at most so many tokens, and how many it has."""
    of_prose = room.count(" ".join(PROSE))
    most = min(tokens, (room.context or 1 << 62) - SPARE)
    sentences = most * len(PROSE) // of_prose
    change = partial(padded, sentences=sentences, side=side)
    used = sentences * of_prose // len(PROSE)
    return Attack(_padding_name(side, tokens), PADDING, change), used


def _padding_name(side: Side, tokens: int) -> str:
    return f"padding {'in front' if side == 'front' else 'behind'}, {tokens}"


def _fits(tokens: int, room: Room) -> bool:
    """Whether the context holds the padding, or nearly."""
    return room.context is None or room.context - SPARE >= 0.9 * tokens


def _translations() -> Iterator[Case]:
    plain = tuple(english())
    every = tuple(tuple(translated(language)) for language in languages())
    about = " ".join((translated.__doc__ or "").split())
    for language, texts in zip(languages(), every, strict=True):
        name, example = f"translated: {language}", texts[HARMLESS].text
        yield Case(name, TRANSLATIONS, about, example, plain, (texts,))
    yield Case(ALL_LANGUAGES, TRANSLATIONS, about, every[0][HARMLESS].text, plain, every)


def require_known(only: Collection[str], others: Collection[str] = ()) -> None:
    """Raise a LatentGuardError if there is no attack or family of such a name."""
    known = [*families(), *others, *names()]
    if unknown := sorted(set(only) - set(known)):
        raise LatentGuardError(
            f"There is no attack '{unknown[0]}'; expected one of {', '.join(known)}."
        )
