"""Attacks on weights: a guard reads its model after quantisation or fine-tuning.

The guard is bound to the changed model, as if the user had allowed the mismatch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from latentguard.errors import GuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.models.lora import Finetuning
from latentguard.models.quantize import quantized_weights
from latentguard.prompts import Prompt
from latentguard.states import digest_prompts
from latentguard.study import labelling
from latentguard.study.axes import fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.figures.figure_07_finetuning.training_pairs import Pair, harmful_pairs
from latentguard.study.prompt_groups import PromptPools, contrast_pools
from latentguard.study.settings import read_settings

FAMILY = "changed weights"
AS_LOADED = "as loaded"
EIGHT_BIT = "8-bit weights"
FOUR_BIT = "4-bit weights"
FINETUNED = "fine-tuned, 50 pairs"
NAMES = (EIGHT_BIT, FOUR_BIT, FINETUNED)

SETTINGS = read_settings(budget="small")
"""Settings of a small study: 50 pairs, LoRA of rank 16, 3 epochs, replies of 16 tokens."""


@dataclass(frozen=True)
class GuardUnderTest:
    """A guard, its model, and the store of what the model answered."""

    guard: LatentGuard
    """Already checked against the model."""

    model: ChatModel
    """The guard's own model."""

    cached_model: CachedModel
    """The same model behind a store of its answers."""

    @cached_property
    def digest(self) -> str:
        """Digest of the guard."""
        return self.guard.digest


@dataclass(frozen=True)
class WeightChange:
    """A way to change a model's weights."""

    name: str
    """One of ``NAMES``, or ``AS_LOADED``."""

    description: str
    """What is done, and its source."""

    open_model: Callable[[], AbstractContextManager[ChatModel]]
    """Opens the changed model; the weights are restored on leaving."""


@dataclass(frozen=True)
class WeightsObservation:
    """Scores and refusals of n prompts, m of them harmful, on one set of weights."""

    model: str
    """Name of the model."""

    scores: list[float]
    """The guard's scores, [n]."""

    refused: list[bool | None]
    """Whether each harmful prompt is refused, [m]; None where the judge is undecided."""


def weight_changes(
    target: GuardUnderTest, only: Collection[str], *, finetune: bool
) -> list[WeightChange]:
    """Return the changes to test: the named ones, or all.

    Args:
        target: The guard and its model.
        only: Names of changes, or the family.
        finetune: Whether the fine-tuning attack, which takes minutes, runs without being named.
    """
    changes = [
        _quantization(target, EIGHT_BIT, 8, "int8"),
        _quantization(target, FOUR_BIT, 4, "NF4"),
        _finetuning(target),
    ]
    if only:
        return [c for c in changes if {c.name, FAMILY} & set(only)]
    return [c for c in changes if finetune or c.name != FINETUNED]


def unchanged_weights(target: GuardUnderTest) -> WeightChange:
    """Return the change that changes nothing."""
    return WeightChange(AS_LOADED, "", lambda: nullcontext(target.model))


def _quantization(
    target: GuardUnderTest, name: str, bits: Literal[4, 8], data_type: str
) -> WeightChange:
    description = (
        f"Linear weights as bitsandbytes {data_type} keeps them, put back in the model's dtype. "
        "Sources: Dettmers et al. (2022), LLM.int8; Dettmers et al. (2023), QLoRA."
    )
    return WeightChange(name, description, partial(quantized_weights, target.model, bits))


def _finetuning(target: GuardUnderTest) -> WeightChange:
    description = (
        "LoRA on harmful requests that are not tested, each with the opening of a reply that "
        "accepts. Sources: the paper, section 5.2; Qi et al. (2023)."
    )
    return WeightChange(FINETUNED, description, partial(_finetuned_model, target))


def observe_weights(
    change: WeightChange, target: GuardUnderTest, prompts: Sequence[Prompt]
) -> WeightsObservation:
    """Score prompts on changed weights; stored, so that nothing is trained twice.

    Raises:
        LatentGuardError: if the weights cannot be changed that way; says why.
    """

    def observe() -> dict[str, object]:
        with change.open_model() as model:
            scores = [v.score for v in target.guard.rebind(model).scan(model, prompts)]
            harmful = [p for p in prompts if p.harmful]
            replies = model.generate(harmful, max_new_tokens=SETTINGS.reply_tokens)
            refused = list(target.cached_model.refused(replies))
            return asdict(WeightsObservation(Path(model.source).name, scores, refused))

    recipe = [change.name, asdict(SETTINGS)]
    key = ["stress, weights", target.digest, recipe, digest_prompts(prompts)]
    return WeightsObservation(**target.cached_model.cached(key, observe))


@contextmanager
def _finetuned_model(target: GuardUnderTest) -> Iterator[ChatModel]:
    finetuning = Finetuning(target.model, SETTINGS.finetuning)
    pairs = _finetuning_pairs(target.cached_model)
    with finetuning(pairs, seed=SETTINGS.seed) as model:
        yield model


def _finetuning_pairs(cached_model: CachedModel) -> list[Pair]:
    """Return the study's training pairs, made of built-in prompts outside the test split."""
    contrast = contrast_pools()
    pools = PromptPools(contrast.harmful, contrast.harmless)
    labels = labelling.collect(cached_model, pools, SETTINGS)
    prompt_groups = labelling.prompt_groups_of(labels, pools, SETTINGS)
    axes = fit_axes(cached_model, prompt_groups, enough=SETTINGS.enough)
    if axes.refuse is None:
        raise GuardError(f"Nothing was fine-tuned: {axes.note}.")
    pairs, note = harmful_pairs(cached_model, axes.refuse, prompt_groups, SETTINGS)
    if not pairs:
        raise GuardError(note)
    return pairs
