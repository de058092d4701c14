"""``latentguard stress``: a guard under every attack, ending in a report."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from latentguard.data.builtin import load_traffic
from latentguard.data.surface_audit import ngram_scores
from latentguard.errors import LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.report.document import Report
from latentguard.robustness import suite, weights
from latentguard.robustness.report import Found, Row, Scores, measure, sections
from latentguard.robustness.suite import BUDGETS, BudgetName, Case, Room
from latentguard.robustness.weights import Change, Seen, Trial
from latentguard.states import Progress, digest_prompts

STORE = "stress.sqlite"
"""Under the report's folder: scores by content hash, and the replies that the fine-tuning attack
is made from. Not for publishing."""

PROMPTS_AT_ONCE, CHARACTERS_AT_ONCE = 16, 20_000
"""What is scored and kept together; a killed run loses no more."""


@dataclass(frozen=True)
class Plan:
    """What is done."""

    prompts: tuple[Prompt, ...]
    """Labelled."""

    budget: BudgetName = "small"
    """How many of them."""

    only: tuple[str, ...] = ()
    """Attacks or families; all if empty."""

    seed: int = 0
    """Of what is left to chance."""


def require_known(only: Collection[str]) -> None:
    """Raise a LatentGuardError if there is no attack or family of such a name."""
    suite.require_known(only, (weights.FAMILY, *weights.NAMES))


def run(trial: Trial, plan: Plan) -> Report:
    """Ask everything, measure, report; what the model remembers is not asked again.

    Raises:
        LatentGuardError: if ``plan.only`` names no attack, or a class of prompts is missing.
    """
    require_known(plan.only)
    budget, room = BUDGETS[plan.budget], room_of(trial.model)
    cases = suite.cases(plan.prompts, budget, room, only=plan.only, seed=plan.seed)
    not_run = suite.left_out(budget, room, only=plan.only)
    words = _words(cases)
    texts = tuple(_rows(trial, cases, words))
    changes = weights.changes(trial, plan.only, finetune=budget.finetune)
    seen, failed = _look(trial, changes, cases[0].plain)
    changed = tuple(
        _changed(change, seen, cases[0], words, trial.guard.threshold)
        for change in changes
        if change.name in seen
    )
    found = Found(texts, changed, seen, not_run | failed)
    title = f"Stress test of a guard for {Path(trial.model.source).name}"
    return Report(title, sections(found, of=_summary(trial.guard)), _meta(trial, plan))


def room_of(model: ChatModel) -> Room:
    """What a chat model can read."""
    config = model.model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    return Room(context, lambda text: len(model.chat([Prompt(text)])[0].ids))


def _words(cases: Sequence[Case]) -> Mapping[str, float]:
    """The n-gram baseline's score of each text."""
    texts = [p for case in cases for prompts in case.variants for p in prompts]
    scores = ngram_scores(load_traffic("train"), texts)
    return dict(zip((p.text for p in texts), scores.tolist(), strict=True))


def _rows(trial: Trial, cases: Sequence[Case], words: Mapping[str, float]) -> Iterator[Row]:
    """Each case, measured."""
    asked = [(case.plain, *case.variants) for case in cases]
    total = sum(len(p.text) for sets in asked for prompts in sets for p in prompts)
    advance = trial.cached_model.step("stress (characters)", total)
    for case, sets in zip(cases, asked, strict=True):
        plain, *attacked = (_scores(trial, prompts, advance) for prompts in sets)
        read = np.array([[words[p.text] for p in prompts] for prompts in case.variants])
        yield measure(case, np.stack(attacked), plain[None], read, trial.guard.threshold)


def _scores(trial: Trial, prompts: Sequence[Prompt], advance: Progress) -> Scores:
    """The guard's scores, [n]; remembered part by part."""
    longest = max(len(p.text) for p in prompts)
    size = max(1, min(PROMPTS_AT_ONCE, CHARACTERS_AT_ONCE // longest))
    found: list[float] = []
    for at in range(0, len(prompts), size):
        part = prompts[at : at + size]
        key = ["stress", trial.digest, digest_prompts(part)]
        found += trial.cached_model.cached(key, partial(_scan, trial, part))
        advance(sum(len(p.text) for p in part))
    return np.array(found)


def _scan(trial: Trial, prompts: Sequence[Prompt]) -> list[float]:
    return [verdict.score for verdict in trial.guard.scan(trial.model, prompts)]


def _look(
    trial: Trial, changes: Sequence[Change], prompts: Sequence[Prompt]
) -> tuple[dict[str, Seen], dict[str, str]]:
    """What is seen on each weights, those as loaded first; and why others could not be made."""
    seen: dict[str, Seen] = {}
    failed: dict[str, str] = {}
    if not changes:
        return seen, failed
    wanted = [weights.as_loaded(trial), *changes]
    advance = trial.cached_model.step("stress (weights)", len(wanted))
    for change in wanted:
        try:
            seen[change.name] = weights.look(change, trial, prompts)
        except LatentGuardError as error:
            failed[change.name] = str(error)
        advance(1)
    return seen, failed


def _changed(
    change: Change,
    seen: Mapping[str, Seen],
    plain: Case,
    words: Mapping[str, float],
    threshold: float,
) -> Row:
    """The row of changed weights: texts, and so the baselines, are those untransformed."""
    case = replace(plain, name=change.name, family=weights.FAMILY, about=change.about)
    before, after = (np.array([seen[name].scores]) for name in (weights.AS_LOADED, change.name))
    read = np.array([[words[p.text] for p in plain.plain]])
    return measure(case, after, before, read, threshold)


def _summary(guard: LatentGuard) -> str:
    reads = f"{', '.join(guard.reading.positions)} with a {guard.probe.kind} probe"
    return f"The guard reads {reads}. Its threshold is {guard.threshold:.4g}: {guard.promise}."


def _meta(trial: Trial, plan: Plan) -> dict[str, Any]:
    return {
        "guard": trial.digest,
        "model": asdict(trial.guard.fingerprint),
        "prompts": digest_prompts(plan.prompts),
        "budget": asdict(BUDGETS[plan.budget]),
        "only": plan.only,
        "seed": plan.seed,
        "versions": {name: version(name) for name in ("latentguard", "torch", "transformers")},
    }
