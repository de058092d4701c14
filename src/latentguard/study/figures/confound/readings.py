"""Ways of reading harmfulness and refusal: the paper's, and controls that form cannot help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from latentguard.data.builtin import load_contrast
from latentguard.probes.axis import Axis
from latentguard.prompts import Group, Prompt
from latentguard.states import Reading, States
from latentguard.study.axes import Axes, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.detectors import Detector, Scores, belief_detector, control_detectors
from latentguard.study.form_controls import sealed_groups
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, sample_prompts
from latentguard.study.settings import Settings

PAPER, MATCHED, SEALED = "paper's axis", "axis of form-matched prompts", "sealed reading"
"""Names of the readings beside the controls."""

POSITIONS = ("t_inst", "t_post")


@dataclass(frozen=True, eq=False)
class BeliefReading:
    """One way of reading."""

    reading: Reading
    """Whether the ending of a prompt is made uniform first."""

    harmful: Detector
    """Delta_harmful at t_inst, or what stands in its place."""

    refuse: Detector | None
    """Delta_refuse at t_post, or what stands in its place; None if too few are refused."""


@dataclass(frozen=True, eq=False)
class BeliefReadings:
    """All of them."""

    of: Mapping[str, BeliefReading]
    """By name."""

    note: str
    """What they were fitted on."""

    missing: tuple[str, ...]
    """What could not be fitted, and why."""


def fit_readings(
    model: CachedModel, prompt_groups: PromptGroups, tested: Sequence[Prompt], settings: Settings
) -> BeliefReadings:
    """Fit the paper's axes, the form-matched and the sealed ones, and the controls.

    Raises:
        GuardError: if there is no harmful or no harmless prompt to fit on.
    """
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    matched, note = _matched(model, prompt_groups, tested, settings)
    missing = () if axes.refuse else (f"No refusal axis ({axes.note}).",)
    if matched is None:
        missing = (*missing, f"No axis of form-matched prompts: {note}.")
    readings = {
        PAPER: _reading(axes),
        **({MATCHED: matched} if matched else {}),
        SEALED: _sealed(model, prompt_groups, settings),
        **_controls(model, prompt_groups, axes, settings),
    }
    return BeliefReadings(readings, f"{axes.note}. Form-matched axis: {note}", missing)


def look(
    model: CachedModel, prompts: Sequence[Prompt], readings: Mapping[str, BeliefReading], what: str
) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Delta_harmful and Delta_refuse of prompts through each reading, [k n] each."""
    states: dict[str, States] = {}
    harmful, refuse = dict[str, Scores](), dict[str, Scores]()
    for name, reading in readings.items():
        at = reading.reading
        if at.name not in states:
            ready = map(at.prepare, prompts)
            states[at.name] = model.states(ready, positions=POSITIONS, what=f"{what}, {at.name}")
        harmful[name] = reading.harmful(states[at.name])
        if reading.refuse is not None:
            refuse[name] = reading.refuse(states[at.name])
    return harmful, refuse


def asked(
    model: CachedModel, prompts: Sequence[Prompt], what: str, settings: Settings
) -> tuple[Prompt, ...]:
    """The prompts with ``refused`` as the model's replies are judged."""
    (replies,) = model.replies(prompts, what=what, max_new_tokens=settings.reply_tokens)
    refused = model.refused(replies)
    return tuple(replace(p, refused=r) for p, r in zip(prompts, refused, strict=True))


def _reading(axes: Axes, reading: str = "t_inst") -> BeliefReading:
    refuse = None if axes.refuse is None else belief_detector(axes.refuse)
    return BeliefReading(Reading.of(reading, 1), belief_detector(axes.harmful), refuse)


def _matched(
    model: CachedModel, prompt_groups: PromptGroups, tested: Sequence[Prompt], settings: Settings
) -> tuple[BeliefReading | None, str]:
    """Axes fitted on pairs of the built-in contrast set, none of which is tested."""
    barred = {p.text for p in tested} | {p.pair for p in tested}
    free = [p for p in load_contrast("train") if p.pair and not barred & {p.text, p.pair}]
    harmful = sample_prompts([p for p in free if p.harmful], settings.fit, seed=settings.seed)
    pairs = {p.pair for p in harmful}
    if len(pairs) < settings.enough:
        return None, f"only {len(pairs)} pairs of the contrast set are not tested"
    matched = [p for p in free if p.pair in pairs]
    labelled = asked(model, matched, "confound: form-matched prompts to fit on", settings)
    states = model.states(labelled, positions=POSITIONS, what="confound: form-matched axis")
    groups = dict(positive="refused_harmful", negative="accepted_harmless")
    counts = [sum(p.group == group for p in labelled) for group in groups.values()]
    few = min(counts) < settings.enough
    refuse = None if few else Axis.fit(states, "t_post", name="refuse", **groups)
    axes = Axes(Axis.fit(states, "t_inst"), refuse, "")
    return _reading(axes), f"{len(pairs)} pairs of the contrast set"


def _sealed(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> BeliefReading:
    """The paper's axes, fitted on prompts whose ending was made uniform."""
    axes = fit_axes(model, sealed_groups(prompt_groups), enough=settings.enough)
    return _reading(axes, "sealed")


def _controls(
    model: CachedModel, prompt_groups: PromptGroups, axes: Axes, settings: Settings
) -> dict[str, BeliefReading]:
    """Controls, turned by the prompts that the paper's axes were fitted on."""
    groups: tuple[Group, ...] = get_args(Group)
    if axes.refuse is not None:
        groups = BEHAVING
    members = [p for group in groups for p in prompt_groups.fit_prompts(group)]
    fit = model.states(members, positions=POSITIONS, what="centroids")
    harmful, refuse = (
        {} if axis is None else control_detectors(axis, fit, settings.random_draws)
        for axis in (axes.harmful, axes.refuse)
    )
    reading = Reading.of("t_inst", 1)
    return {name: BeliefReading(reading, rule, refuse.get(name)) for name, rule in harmful.items()}
