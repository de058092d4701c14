"""Changed weights: the guard goes on reading a model that was fine-tuned or quantised under it.

The guard is bound to it for that, as by a user who allows the mismatch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

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
FINETUNED = "fine-tuned, 50 pairs"
NAMES = ("8-bit weights", "4-bit weights", FINETUNED)
SETTINGS = read_settings(budget="small")
"""Those of a small study: 50 pairs, LoRA of rank 16, 3 epochs, replies of 16 tokens."""


@dataclass(frozen=True)
class Trial:
    """A guard under test."""

    guard: LatentGuard
    """Checked against the model already."""

    model: ChatModel
    """Its model."""

    cached_model: CachedModel
    """The same model with its memory and its progress bar."""

    @cached_property
    def digest(self) -> str:
        """Of the guard."""
        return self.guard.digest


@dataclass(frozen=True)
class Change:
    """A way to change a model's weights."""

    name: str
    """One of ``NAMES``, or ``AS_LOADED``."""

    about: str
    """What is done, and the source."""

    open: Callable[[], AbstractContextManager[ChatModel]]
    """The changed model; on leaving, the weights are as they were."""


@dataclass(frozen=True)
class Seen:
    """What was seen of n prompts, m of them harmful, on some weights."""

    model: str
    """What the model is then called."""

    scores: list[float]
    """Of the guard, [n]."""

    refused: list[bool | None]
    """Whether each harmful prompt is refused, [m]; None where the judge cannot tell."""


def changes(trial: Trial, only: Collection[str], *, finetune: bool) -> list[Change]:
    """The changes to look at: those named, or all.

    Args:
        trial: The guard and its model.
        only: Names, or the family.
        finetune: Whether the fine-tuning attack, which takes minutes, runs without being named.
    """
    source = "Sources: Dettmers et al. (2022), LLM.int8; Dettmers et al. (2023), QLoRA."
    rounded = "Linear weights as {} keeps them, put back in the model's dtype. " + source
    tuned = (
        "LoRA on harmful requests that are not tested, each with the opening of a reply that "
        "accepts. Sources: the paper, section 5.2; Qi et al. (2023)."
    )
    abouts = (rounded.format("bitsandbytes int8"), rounded.format("bitsandbytes NF4"), tuned)
    opens = (
        partial(quantized_weights, trial.model, 8),
        partial(quantized_weights, trial.model, 4),
        partial(_finetuned, trial),
    )
    every = map(Change, NAMES, abouts, opens)
    if only:
        return [c for c in every if {c.name, FAMILY} & set(only)]
    return [c for c in every if finetune or c.name != FINETUNED]


def as_loaded(trial: Trial) -> Change:
    """No change at all."""
    return Change(AS_LOADED, "", lambda: nullcontext(trial.model))


def look(change: Change, trial: Trial, prompts: Sequence[Prompt]) -> Seen:
    """What is seen on changed weights; remembered, so that nothing is trained twice.

    Raises:
        LatentGuardError: if the weights cannot be changed that way; says why.
    """

    def compute() -> dict[str, object]:
        with change.open() as model:
            scores = [v.score for v in trial.guard.rebind(model).scan(model, prompts)]
            harmful = [p for p in prompts if p.harmful]
            replies = model.generate(harmful, max_new_tokens=SETTINGS.reply_tokens)
            refused = list(trial.cached_model.refused(replies))
            return asdict(Seen(Path(model.source).name, scores, refused))

    how = [change.name, asdict(SETTINGS)]
    parts = ["stress, weights", trial.digest, how, digest_prompts(prompts)]
    return Seen(**trial.cached_model.cached(parts, compute))


@contextmanager
def _finetuned(trial: Trial) -> Iterator[ChatModel]:
    tune = Finetuning(trial.model, SETTINGS.finetuning)
    with tune(_pairs(trial.cached_model), seed=SETTINGS.seed) as attacked:
        yield attacked


def _pairs(cached_model: CachedModel) -> list[Pair]:
    """The study's pairs, made of built-in prompts outside the test split."""
    every = contrast_pools()
    pools = PromptPools(every.harmful, every.harmless)
    asked = labelling.collect(cached_model, pools, SETTINGS)
    prompt_groups = labelling.prompt_groups_of(asked, pools, SETTINGS)
    axes = fit_axes(cached_model, prompt_groups, enough=SETTINGS.enough)
    if axes.refuse is None:
        raise GuardError(f"Nothing was fine-tuned: {axes.note}.")
    pairs, how = harmful_pairs(cached_model, axes.refuse, prompt_groups, SETTINGS)
    if not pairs:
        raise GuardError(how)
    return pairs
