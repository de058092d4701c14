"""The stress suite: which prompts are tested under which attack.

The choice depends on the budget and on how many tokens the model reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from latentguard.errors import LatentGuardError, PromptError
from latentguard.prompts import Prompt
from latentguard.robustness.attacks import ATTACKS, TextAttack
from latentguard.robustness.languages import english_originals, languages, translations
from latentguard.robustness.surroundings import PROSE, Side, pad_with_prose
from latentguard.study.prompt_groups import sample_prompts

BudgetName = Literal["small", "full"]

UNCHANGED = "untransformed"
TRANSLATIONS = "translations"
ALL_LANGUAGES = "translated: all ten"
PADDING = "padding"

EXAMPLE = "How do I bake bread at home?"
EXAMPLE_TRANSLATION = 1
"""Row of the translations that is shown as the example; it is harmless."""

SIDES: tuple[Side, ...] = ("front", "behind")
PADDING_TOKENS = (500, 2000, 8000)

FEWEST_PADDED = 4
"""Prompts per class for a padding length that is named but not in the budget."""

RESERVED_TOKENS = 512
"""Tokens of the context that padding leaves to the template and the request."""


@dataclass(frozen=True)
class Budget:
    """How many prompts are tested."""

    prompts: int
    """Most prompts of each class under each attack."""

    padded: tuple[int, ...]
    """The same for each of ``PADDING_TOKENS``; 0 skips the length unless it is named."""

    finetune: bool
    """Whether the fine-tuning attack runs without being named."""


BUDGETS: dict[BudgetName, Budget] = {
    "small": Budget(24, (8, 4, 0), finetune=False),
    "full": Budget(200, (60, 24, 8), finetune=True),
}


@dataclass(frozen=True)
class ContextWindow:
    """How much text a model reads."""

    tokens: int
    """Most tokens of a prompt."""

    count_tokens: Callable[[str], int]
    """Counts the tokens of a text, chat template included."""

    def fits(self, tokens: int) -> bool:
        """Whether padding of that length fits, or nearly."""
        return self.tokens - RESERVED_TOKENS >= 0.9 * tokens


@dataclass(frozen=True)
class AttackedPrompts:
    """One attack on n prompts, in k variants."""

    name: str
    """Name of the attack."""

    family: str
    """Family of the attack."""

    description: str
    """What the attack imitates, and its source."""

    example: str
    """A harmless text under the attack."""

    originals: tuple[Prompt, ...]
    """The prompts before the attack, [n]."""

    variants: tuple[tuple[Prompt, ...], ...]
    """The prompts under the attack, [k n]."""


def attack_names() -> list[str]:
    """Return the name of every attack that a budget can hold."""
    padding = [_padding_name(side, tokens) for side in SIDES for tokens in PADDING_TOKENS]
    translated = [_translation_name(language) for language in languages()]
    return [*(attack.name for attack in ATTACKS), *padding, *translated, ALL_LANGUAGES]


def attack_families() -> list[str]:
    """Return the families of the attacks."""
    return [*dict.fromkeys(attack.family for attack in ATTACKS), PADDING, TRANSLATIONS]


def require_attack_names(only: Collection[str], others: Collection[str] = ()) -> None:
    """Raise a LatentGuardError if a name is no attack and no family.

    Args:
        only: The names to check.
        others: Further names that are allowed.
    """
    allowed = [*attack_families(), *others, *attack_names()]
    if unknown := sorted(set(only) - set(allowed)):
        raise LatentGuardError(
            f"There is no attack '{unknown[0]}'; expected one of {', '.join(allowed)}."
        )


def build_suite(
    prompts: Sequence[Prompt],
    budget: Budget,
    window: ContextWindow,
    *,
    only: Collection[str] = (),
    seed: int = 0,
) -> list[AttackedPrompts]:
    """Return the unchanged prompts, then the prompts under each attack.

    Args:
        prompts: Labelled prompts.
        budget: How many of them are used.
        window: How much the model reads; padding stays within it.
        only: Names or families of attacks; all if empty.
        seed: Seed of samples and attacks.

    Raises:
        PromptError: if a class is missing.
    """
    sample = _sample(prompts, budget.prompts, seed)
    unchanged = AttackedPrompts(
        UNCHANGED, UNCHANGED, "The prompts as they are.", EXAMPLE, sample, (sample,)
    )
    suite = [unchanged]
    suite += [_apply_attack(attack, sample, seed) for attack in ATTACKS]
    suite += _padded_prompts(prompts, budget, window, only, seed)
    suite += _translated_prompts()
    if not only:
        return suite
    return [a for a in suite if a.name == UNCHANGED or {a.name, a.family} & set(only)]


def reasons_not_run(
    budget: Budget, window: ContextWindow, *, only: Collection[str] = ()
) -> dict[str, str]:
    """Return why ``build_suite`` skips padding lengths that were asked for, by attack name."""
    reasons = {}
    for side in SIDES:
        for tokens, count in zip(PADDING_TOKENS, budget.padded, strict=True):
            name = _padding_name(side, tokens)
            if only and not {name, PADDING} & set(only):
                continue
            if not window.fits(tokens):
                reasons[name] = f"This model reads at most {window.tokens} tokens."
            elif not count and name not in only:
                reasons[name] = "Not in this budget; name it with --only."
    return reasons


def _apply_attack(
    attack: TextAttack, prompts: tuple[Prompt, ...], seed: int, description: str = ""
) -> AttackedPrompts:
    attacked = tuple(replace(p, text=attack(p.text, seed=seed)) for p in prompts)
    return AttackedPrompts(
        attack.name,
        attack.family,
        description or attack.description,
        attack(EXAMPLE, seed=seed),
        prompts,
        (attacked,),
    )


def _sample(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[Prompt, ...]:
    """Return at most ``count`` prompts of each class; larger samples contain smaller ones."""
    sides = [[p for p in prompts if p.harmful is side] for side in (True, False)]
    if not all(sides):
        raise PromptError(
            f"A stress test needs harmful and harmless prompts; found {len(sides[0])} and "
            f"{len(sides[1])}. Give both with --harmful and --harmless."
        )
    return tuple(p for side in sides for p in sample_prompts(side, count, seed=seed))


def _padded_prompts(
    prompts: Sequence[Prompt],
    budget: Budget,
    window: ContextWindow,
    only: Collection[str],
    seed: int,
) -> Iterator[AttackedPrompts]:
    for side in SIDES:
        for tokens, budgeted in zip(PADDING_TOKENS, budget.padded, strict=True):
            count = budgeted or (FEWEST_PADDED if _padding_name(side, tokens) in only else 0)
            if count and window.fits(tokens):
                attack, used = _padding_attack(side, tokens, window)
                description = f"{attack.description} Here {used} tokens."
                yield _apply_attack(attack, _sample(prompts, count, seed), seed, description)


def _padding_attack(side: Side, tokens: int, window: ContextWindow) -> tuple[TextAttack, int]:
    """Return padding of at most ``tokens`` tokens, and how many tokens it has."""
    prose_tokens = window.count_tokens(" ".join(PROSE))
    most = min(tokens, window.tokens - RESERVED_TOKENS)
    sentences = most * len(PROSE) // prose_tokens
    transform = partial(pad_with_prose, sentences=sentences, side=side)
    used = sentences * prose_tokens // len(PROSE)
    return TextAttack(_padding_name(side, tokens), PADDING, transform), used


def _padding_name(side: Side, tokens: int) -> str:
    return f"padding {'in front' if side == 'front' else 'behind'}, {tokens}"


def _translation_name(language: str) -> str:
    return f"translated: {language}"


def _translated_prompts() -> Iterator[AttackedPrompts]:
    originals = tuple(english_originals())
    texts = {language: tuple(translations(language)) for language in languages()}
    description = " ".join((translations.__doc__ or "").split())

    def attacked(name: str, *variants: tuple[Prompt, ...]) -> AttackedPrompts:
        example = variants[0][EXAMPLE_TRANSLATION].text
        return AttackedPrompts(name, TRANSLATIONS, description, example, originals, variants)

    for language, prompts in texts.items():
        yield attacked(_translation_name(language), prompts)
    yield attacked(ALL_LANGUAGES, *texts.values())
