"""``latentguard stress``: tests a guard under every attack and reports the results."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from latentguard.data.builtin import load_guard_prompts
from latentguard.data.surface_audit import ngram_scores
from latentguard.errors import LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.report.document import Report
from latentguard.robustness import suite, weights
from latentguard.robustness.report import (
    AttackResult,
    Scores,
    StressResults,
    measure_attack,
    report_sections,
)
from latentguard.robustness.suite import BUDGETS, AttackedPrompts, BudgetName, ContextWindow
from latentguard.robustness.weights import GuardUnderTest, WeightChange, WeightsObservation
from latentguard.states import Progress, digest_prompts

STORE = "stress.sqlite"
"""File in the report's folder that lets a killed run go on: scores by content hash, and the replies
that the fine-tuning attack is made from. Not for publishing."""

MAX_BATCH_PROMPTS = 16
MAX_BATCH_CHARACTERS = 20_000
"""A batch is scored and stored together; a killed run loses at most one."""


@dataclass(frozen=True)
class StressPlan:
    """What a stress test runs."""

    prompts: tuple[Prompt, ...]
    """Labelled prompts."""

    budget: BudgetName = "small"
    """How many of them are used."""

    only: tuple[str, ...] = ()
    """Names or families of attacks; all if empty."""

    seed: int = 0
    """Seed of samples and attacks."""


def require_attack_names(only: Collection[str]) -> None:
    """Raise a LatentGuardError if a name is no attack and no family."""
    suite.require_attack_names(only, (weights.FAMILY, *weights.NAMES))


def run_stress(target: GuardUnderTest, plan: StressPlan) -> Report:
    """Score every attacked prompt, measure, and report; stored scores are used again.

    Raises:
        LatentGuardError: if ``plan.only`` names no attack, or a class of prompts is missing.
    """
    require_attack_names(plan.only)
    budget = BUDGETS[plan.budget]
    window = context_window_of(target.model)
    attacks = suite.build_suite(plan.prompts, budget, window, only=plan.only, seed=plan.seed)
    not_run = suite.reasons_not_run(budget, window, only=plan.only)
    ngrams = _ngram_scores(attacks)
    text_results = tuple(_text_results(target, attacks, ngrams))
    changes = weights.weight_changes(target, plan.only, finetune=budget.finetune)
    observations, failures = _observe_changes(target, changes, attacks[0].originals)
    weight_results = tuple(
        _weights_result(change, observations, attacks[0], ngrams, target.guard.threshold)
        for change in changes
        if change.name in observations
    )
    results = StressResults(text_results, weight_results, observations, not_run | failures)
    title = f"Stress test of a guard for {Path(target.model.source).name}"
    sections = report_sections(results, summary=_guard_summary(target.guard))
    return Report(title, sections, _metadata(target, plan))


def context_window_of(model: ChatModel) -> ContextWindow:
    """Return how much text a chat model reads."""
    return ContextWindow(model.max_tokens, lambda text: len(model.chat([Prompt(text)])[0].ids))


def _ngram_scores(attacks: Sequence[AttackedPrompts]) -> Mapping[str, float]:
    """Return the score of the n-gram baseline for each text."""
    prompts = [p for attack in attacks for variant in attack.variants for p in variant]
    scores = ngram_scores(load_guard_prompts("train"), prompts)
    return dict(zip((p.text for p in prompts), scores.tolist(), strict=True))


def _text_results(
    target: GuardUnderTest, attacks: Sequence[AttackedPrompts], ngrams: Mapping[str, float]
) -> Iterator[AttackResult]:
    prompt_sets = [(attack.originals, *attack.variants) for attack in attacks]
    characters = sum(len(p.text) for sets in prompt_sets for prompts in sets for p in prompts)
    advance = target.cached_model.step("stress (characters)", characters)
    for attack, sets in zip(attacks, prompt_sets, strict=True):
        originals, *attacked = (_score(target, prompts, advance) for prompts in sets)
        baseline = np.array([[ngrams[p.text] for p in variant] for variant in attack.variants])
        yield measure_attack(
            attack, np.stack(attacked), originals[None], baseline, target.guard.threshold
        )


def _score(target: GuardUnderTest, prompts: Sequence[Prompt], advance: Progress) -> Scores:
    """Return the guard's scores, [n], stored batch by batch."""
    longest = max(len(p.text) for p in prompts)
    size = max(1, min(MAX_BATCH_PROMPTS, MAX_BATCH_CHARACTERS // longest))
    scores: list[float] = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        key = ["stress", target.digest, digest_prompts(batch)]
        scores += target.cached_model.cached(key, partial(_scan_scores, target, batch))
        advance(sum(len(p.text) for p in batch))
    return np.array(scores)


def _scan_scores(target: GuardUnderTest, prompts: Sequence[Prompt]) -> list[float]:
    return [verdict.score for verdict in target.guard.scan(target.model, prompts)]


def _observe_changes(
    target: GuardUnderTest, changes: Sequence[WeightChange], prompts: Sequence[Prompt]
) -> tuple[dict[str, WeightsObservation], dict[str, str]]:
    """Return what each change gives, the unchanged weights first, and why others failed."""
    observations: dict[str, WeightsObservation] = {}
    failures: dict[str, str] = {}
    if not changes:
        return observations, failures
    with_unchanged = [weights.unchanged_weights(target), *changes]
    advance = target.cached_model.step("stress (weights)", len(with_unchanged))
    for change in with_unchanged:
        try:
            observations[change.name] = weights.observe_weights(change, target, prompts)
        except LatentGuardError as error:
            failures[change.name] = str(error)
        advance(1)
    return observations, failures


def _weights_result(
    change: WeightChange,
    observations: Mapping[str, WeightsObservation],
    unchanged: AttackedPrompts,
    ngrams: Mapping[str, float],
    threshold: float,
) -> AttackResult:
    """Measure changed weights; the texts, and so the baselines, are the unchanged ones."""
    attack = replace(
        unchanged, name=change.name, family=weights.FAMILY, description=change.description
    )
    before = np.array([observations[weights.AS_LOADED].scores])
    after = np.array([observations[change.name].scores])
    baseline = np.array([[ngrams[p.text] for p in unchanged.originals]])
    return measure_attack(attack, after, before, baseline, threshold)


def _guard_summary(guard: LatentGuard) -> str:
    reading = f"{', '.join(guard.reading.positions)} with a {guard.probe.kind} probe"
    read = f"The guard reads {reading}. Its threshold is {guard.threshold:.4g}."
    return f"{read} Promise: {guard.promise}."


def _metadata(target: GuardUnderTest, plan: StressPlan) -> dict[str, Any]:
    return {
        "guard": target.digest,
        "model": asdict(target.guard.fingerprint),
        "prompts": digest_prompts(plan.prompts),
        "budget": asdict(BUDGETS[plan.budget]),
        "only": plan.only,
        "seed": plan.seed,
        "versions": {name: version(name) for name in ("latentguard", "torch", "transformers")},
    }
