"""Contenders: the guards of Tables 3, 8 and 9, and how each comes to its rule.

All but the guard models learn from the same prompts: those that appendix B sets apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.guard.latent_guard import LatentGuard
from latentguard.probes.axis import Axis
from latentguard.prompts import Prompt
from latentguard.states import Progress, Reading, States, TokenQueries, digest_prompts
from latentguard.stats.bounds import smallest_n
from latentguard.study.cached_model import CachedModel
from latentguard.study.detectors import Detector, Scores, belief_detector, control_detectors
from latentguard.study.prompt_groups import PromptGroups, is_fit_side, sample_prompts
from latentguard.study.settings import Settings

PAPER, LINEAR = "Latent Guard", "linear guard (span)"

PAPERS_GUARD = {
    "paper": "Latent Guard is the paper's: equation 3 with centroids of refused harmful prompts "
    "(and accepted ones of the same sets) and of accepted harmless ones, XSTest among them",
    "controlled": "Latent Guard has the paper's rule (equation 3), but is not the paper's guard: "
    "its harmless centroid has no XSTest prompts, and other labels decide who is refused",
}
"""What Latent Guard is under each protocol."""

MAX_FPR = 0.05
"""False-positive rate that the linear guard is calibrated for."""

FEWEST = 10
"""Prompts of each label that a linear guard needs."""

AT_ONCE = 64
"""Prompts of a guard model that are kept together."""


@dataclass(frozen=True, eq=False)
class Training:
    """What guards learn from."""

    states: States
    """Of labelled prompts, at every position from t_inst on, all layers."""

    calibration: tuple[Prompt, ...]
    """Other harmless prompts, of the same pool, to set a threshold by."""

    note: str
    """Both in words, with n."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A group of prompts with the score of each by each guard."""

    name: str
    """Such as ``jailbreak: suffix`` or ``accepted harmful``."""

    prompts: tuple[Prompt, ...]
    """The n prompts; all of one label but in user traffic."""

    scores: Mapping[str, Scores]
    """Guard -> [k n]; a prompt is flagged if its score is greater than 0."""

    def flags(self, rule: str) -> NDArray[np.bool_]:
        """What a guard flags, [k n]."""
        flagged: NDArray[np.bool_] = self.scores[rule] > 0
        return flagged

    def right(self, rule: str) -> NDArray[np.bool_]:
        """Where a guard is right, [k n]."""
        right: NDArray[np.bool_] = self.flags(rule) == [bool(p.harmful) for p in self.prompts]
        return right


def training(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings
) -> Training | None:
    """The prompts of appendix B: refused and accepted harmful ones, and accepted harmless ones.

    Returns:
        None if one of the labels is missing.
    """
    refused, accepted = (
        prompt_groups.fit_prompts(g) for g in ("refused_harmful", "accepted_harmful")
    )
    harmful = sample_prompts((*refused, *accepted), settings.fit, seed=settings.seed)
    harmless = prompt_groups.fit_prompts("accepted_harmless")[: settings.fit]
    if not harmful or not harmless:
        return None
    tested = {p.text for group in prompt_groups.test.values() for p in group}
    used = {p.text for p in (*harmful, *harmless)} | tested
    free = [p for p in prompt_groups.pools.harmless if is_fit_side(p) and p.text not in used]
    calibration = tuple(sample_prompts(free, 2 * settings.fit, seed=settings.seed))
    states = model.states([*harmful, *harmless], positions=model.span, what="guards: training")
    count = sum(bool(p.refused) for p in harmful)
    note = (
        f"Learnt from {len(harmful)} harmful prompts ({count} of them refused) and {len(harmless)} "
        f"accepted harmless ones, none of which is tested; {_threshold(calibration)}. "
        f"{PAPERS_GUARD[settings.protocol]}"
    )
    return Training(states, calibration, note)


def rules(model: CachedModel, training_set: Training, settings: Settings) -> dict[str, Detector]:
    """The paper's rule, the linear guard (where there are prompts enough), and the controls."""
    axis = Axis.fit(training_set.states, "t_inst")
    controls = control_detectors(axis, training_set.states, settings.random_draws)
    return latent_rules(model, training_set.states, training_set.calibration) | controls


def latent_rules(
    model: CachedModel, states: States, calibration: Sequence[Prompt]
) -> dict[str, Detector]:
    """The two guards that read states, fitted on labelled states at every position from t_inst on.

    Raises:
        GuardError: if a label is missing.
    """
    detectors = {PAPER: belief_detector(Axis.fit(states, "t_inst"))}
    harmful = sum(bool(p.harmful) for p in states.prompts)
    if min(harmful, len(states) - harmful) >= FEWEST:
        detectors[LINEAR] = _linear(model, states, calibration)
    return detectors


def scored(
    model: CachedModel, name: str, prompts: Sequence[Prompt], detectors: Mapping[str, Detector]
) -> tuple[Scored, States]:
    """A group judged by every rule and every guard model; and its states, for other fits."""
    states = model.states(prompts, positions=model.span, what=f"guards: {name}")
    scores = {rule: score(states) for rule, score in detectors.items()}
    scores |= unsafe_scores(model, prompts, f"guards: {name}")
    return Scored(name, tuple(prompts), scores), states


def unsafe_scores(model: CachedModel, prompts: Sequence[Prompt], what: str) -> dict[str, Scores]:
    """P(unsafe) - 0.5 of each baseline guard model, [1 n] each; answers are kept."""
    scores = {}
    for name, guard in model.tools.guards.items():
        advance = model.step(f"{what}, {name}", len(prompts))
        chances: list[float] = []
        for chunk in (prompts[at : at + AT_ONCE] for at in range(0, len(prompts), AT_ONCE)):
            parts = ["unsafe", name, digest_prompts(chunk)]
            chances += model.cached(parts, partial(guard, chunk))
            advance(len(chunk))
        scores[name] = np.array([chances]) - 0.5
    return scores


def _linear(model: CachedModel, states: States, calibration: Sequence[Prompt]) -> Detector:
    """The linear probe of ``span``; its threshold is calibrated if that is possible."""
    backend = _Remembered(model)
    guard = LatentGuard.from_states(backend, states, Reading.of("span", backend.post))
    if len(calibration) < smallest_n(MAX_FPR):
        return lambda states: np.array([[v.probability - 0.5 for v in guard.judge(states)]])
    ready = guard.calibrate(backend, calibration, max_fpr=MAX_FPR)
    return lambda states: np.array([[v.score - ready.threshold for v in ready.judge(states)]])


def _threshold(calibration: Sequence[Prompt]) -> str:
    if len(calibration) < smallest_n(MAX_FPR):
        return "the linear guard flags what it gives a probability above 0.5"
    return (
        f"the linear guard's threshold is set for {MAX_FPR:.0%} false positives on "
        f"{len(calibration)} other harmless prompts of that pool"
    )


class _Remembered:
    """The model as a backend, so that a guard reads states that are kept."""

    def __init__(self, model: CachedModel) -> None:
        self._model = model
        self.fingerprint, self.depth = model.uncached.fingerprint, model.depth
        self.post = len(model.span) - 1

    def capture(
        self,
        prompts: Any,
        *,
        positions: Sequence[str] = ("t_inst", "t_post"),
        layers: Sequence[int] | None = None,
        queries: TokenQueries | None = None,
        progress: Progress | None = None,
    ) -> Iterator[States]:
        """The states of the prompts, in one batch."""
        states = self._model.states(prompts, positions=positions, what="guards: calibration")
        yield states if layers is None else states.select(layers)
