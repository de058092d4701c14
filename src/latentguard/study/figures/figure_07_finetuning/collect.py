"""The attack: train on more and more pairs, look at the model each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from latentguard.prompts import Prompt
from latentguard.study.axes import fit_axes
from latentguard.study.cached_model import CachedModel, Finetune
from latentguard.study.figures.figure_07_finetuning.snapshot import Job, Look, Stage
from latentguard.study.figures.figure_07_finetuning.training_pairs import (
    harmful_pairs,
    harmless_pairs,
    whole_pairs,
)
from latentguard.study.form_controls import form_scores
from latentguard.study.prompt_groups import BEHAVING, PromptGroups
from latentguard.study.settings import Settings


@dataclass(frozen=True)
class Records:
    """Every stage, the first before the attack; none if nothing could be trained."""

    prompts: tuple[Prompt, ...] = ()
    """The n tested: refused harmful ones, then accepted harmless ones."""

    stages: tuple[Stage, ...] = ()
    """Before, after each size, after the controls."""

    layers: tuple[int, ...] = ()
    """Where harmless prompts were steered."""

    how: str = ""
    """How the training pairs were made, with n."""

    reason: str = ""
    """Why nothing was trained."""

    every_source: tuple[Prompt, ...] = ()
    """The k refused harmful prompts of every source: the other test set."""

    matched: tuple[Prompt, ...] = ()
    """The m form-matched prompts."""

    form: tuple[float, ...] = ()
    """What form alone says of them, [m]."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Make the pairs, train on each size, and look at the model before and after."""
    tune, most = model.tools.finetune, settings.finetune_test
    harmful, harmless = (prompt_groups.test_prompts(g)[:most] for g in BEHAVING)
    reason = _lacking(tune, harmful, prompt_groups)
    if reason or tune is None:
        return Records(reason=reason)
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    if axes.refuse is None:
        return Records(reason=f"Nothing was fine-tuned. {axes.note}.")
    pairs, how = harmful_pairs(model, axes.refuse, prompt_groups, settings)
    if not pairs:
        return Records(reason=how)
    sizes = sorted({min(size, len(pairs)) for size in settings.finetune_sizes})
    last = sizes[::-1][: settings.finetune_controls]
    controls = [harmless_pairs(model, prompt_groups, settings, size) for size in last]
    look = Look(model, axes, prompt_groups, settings, (*harmful, *harmless))
    stages = [look.before()]
    whole = whole_pairs(model, axes.refuse, prompt_groups, settings)
    jobs = [
        *(Job(pairs[:size]) for size in sizes),
        *(Job(one, control=True) for one in controls if one),
        *(Job(whole[:n], whole=True) for n in sorted({min(s, len(whole)) for s in sizes} - {0})),
    ]
    jobs = [replace(job, seed=seed) for seed in range(settings.finetune_seeds) for job in jobs]
    advance = model.step("fine-tuning", len(jobs))
    for job in jobs:
        stages.append(look.after(tune, job))
        advance(1)
    if whole:
        how += f"; {len(whole)} whole completions of at most {settings.finetune_completion} tokens"
    form = tuple(form_scores(look.fitted, look.matched)) if look.matched else ()
    return Records(
        look.tested,
        tuple(stages),
        look.layers,
        how,
        every_source=look.every_source,
        matched=look.matched,
        form=form,
    )


def _lacking(tune: Finetune | None, tested: Sequence[Prompt], prompt_groups: PromptGroups) -> str:
    if tune is None:
        return (
            "Nothing was fine-tuned: that needs a model on transformers and peft "
            "(pip install 'latentguard[finetune]')."
        )
    fitted = [prompt_groups.fit_prompts(g) for g in BEHAVING]
    if not tested or not all(fitted):
        return "Nothing was fine-tuned: refused harmful or accepted harmless prompts are missing."
    return ""
