"""LatentGuard: a reading, a probe and a threshold, bound to one model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from scipy.special import expit
from torch import Tensor

from latentguard.errors import GuardError, ModelMismatch
from latentguard.guard.artifact import POLES, model_card, read_folder, require_sound, write_folder
from latentguard.guard.calibrate import fit_calibration, require_enough
from latentguard.guard.categories import Categories, nearest_category
from latentguard.guard.chunking import Chunking
from latentguard.guard.compatibility import (
    Canary,
    Shift,
    canary_prompts,
    explain_mismatch,
    require_readable,
)
from latentguard.guard.leakage import (
    TrainingPrompts,
    exclude_training_prompts,
    prompt_digest,
    require_unseen,
)
from latentguard.guard.probabilities import fit_platt
from latentguard.guard.quadrants import Quadrants
from latentguard.guard.reading_plan import (
    Outcome,
    ScoredPlan,
    Variant,
    VariantScore,
    Version,
    combine,
    plan,
    score_plans,
)
from latentguard.guard.thresholds import Rates, Thresholds
from latentguard.guard.verdict import Decision, Verdict
from latentguard.probes import fitting
from latentguard.probes.axis import Axis
from latentguard.probes.capture_cache import CaptureCache
from latentguard.probes.probe import Kind, Probe, layers_of, require_kind
from latentguard.prompts import Prompt, as_prompts
from latentguard.states import (
    DEFAULT_READING,
    Backend,
    Fingerprint,
    Progress,
    Reading,
    Scoring,
    States,
    digest_prompts,
)
from latentguard.stats.bounds import Bound, smallest_n
from latentguard.text.deobfuscation import OBFUSCATIONS, RULES

T = TypeVar("T")

TIE = 1e-4
"""Versions of a prompt whose scores differ by less, in standard deviations, are alike."""

NOT_FINITE = (
    "A score or a belief is not a finite number, so no verdict can be given; use bfloat16 or "
    "float32 instead of float16."
)


@dataclass(frozen=True, eq=False)
class LatentGuard:
    """A guard for one model; immutable."""

    reading: Reading
    """Where it reads."""

    probe: Probe
    """How states become a score."""

    axes: tuple[Axis, ...]
    """``harmful`` at t_inst; ``refuse`` at t_post where refusals were known."""

    fingerprint: Fingerprint
    """The model it is bound to."""

    platt: tuple[float, float]
    """Slope and intercept: probability = sigmoid(slope * score + intercept)."""

    spread: float
    """Standard deviation of the training scores."""

    canaries: tuple[Canary, ...] = ()
    """Checked when the guard meets a model."""

    threshold: float = 0.0
    """A prompt is flagged if its score is greater."""

    bound: Bound | None = None
    """What calibration promises of the threshold; None before."""

    fitted: dict[str, Any] | None = None
    """Provenance: counts, choices, digests of the data, versions."""

    training_digests: Int[Tensor, "n"] = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.long)
    )
    """Digests of the prompts that it was fitted on (``leakage``)."""

    deobfuscate: bool = False
    """Whether text that looks obfuscated is also read decoded."""

    chunking: Chunking | None = None
    """How long prompts and chats are read; None reads them whole, and only whole."""

    thresholds: Thresholds | None = None
    """Thresholds by segment and the map to probabilities; None before calibration."""

    quadrants: Quadrants | None = None
    """What both beliefs say together; None without a refusal axis."""

    categories: Categories | None = None
    """The risk categories that it names, and packs of categories that can flag."""

    # ---- fitting

    @staticmethod
    def fit(
        backend: Backend,
        prompts: Iterable[Prompt],
        *,
        reading: str = DEFAULT_READING,
        probe: Kind = "linear",
        progress: Progress | None = None,
        cache: CaptureCache | None = None,
    ) -> LatentGuard:
        """Capture the states of labelled prompts and fit a guard.

        Args:
            backend: The model.
            prompts: Labelled harmful or harmless.
            reading: ``t_inst``, ``t_post``, ``post+k``, ``sealed``, ``span`` or ``pooled``.
            probe: ``centroid`` (the paper) or ``linear``.
            progress: Called with the number of prompts captured.
            cache: Keeps the states while they are captured, so that a killed fit goes on from them.

        Raises:
            GuardError: if a prompt has no label, a class is missing, or a state is not finite.
        """
        where = Reading.of(reading, backend.post)
        require_kind(probe)
        rows = fitting.require_labels(prompts)
        layers = layers_of(probe, backend.depth)
        states = fitting.capture(
            backend, where, rows, layers=layers, progress=progress, cache=cache
        )
        return LatentGuard.from_states(backend, states, where, probe)

    @staticmethod
    def from_states(
        backend: Backend, states: States, reading: Reading, probe: Kind = "linear"
    ) -> LatentGuard:
        """Fit a guard on states that were captured already (``fitting.fit_probe``)."""
        fit = fitting.fit_probe(states, reading, probe, backend.depth)
        axes = fitting.fit_axes(states, fit.probe.layers)
        labels = np.array([bool(p.harmful) for p in states.prompts])
        guard = LatentGuard(
            reading=reading,
            probe=fit.probe,
            axes=axes,
            fingerprint=backend.fingerprint,
            platt=fit_platt(fit.held_out, labels),
            spread=float(fit.held_out.std()),
            fitted=fitting.provenance(states, fit),
            training_digests=torch.tensor([prompt_digest(p) for p in states.prompts]),
            deobfuscate=probe == "linear",  # the paper's guard reads what is served, only
            quadrants=Quadrants() if len(axes) > 1 else None,
            categories=Categories.fit(
                states.select(fit.probe.layers), reading.positions, fit.held_out
            ),
        )
        return guard.with_canaries(backend, [p.text for p in canary_prompts()])

    def with_canaries(self, backend: Backend, texts: Sequence[str] = ()) -> LatentGuard:
        """The same guard, these canaries or its own scored as it scores now."""
        texts = texts or [canary.text for canary in self.canaries]
        scores = [verdict.score for verdict in self.scan(backend, texts)]
        return replace(self, canaries=tuple(map(Canary, texts, scores)))

    def calibrate(
        self,
        backend: Backend,
        prompts: Iterable[Prompt],
        *,
        max_fpr: float = 0.01,
        review_fpr: float | None = None,
        confidence: float = 0.95,
        segment_column: str | None = None,
        progress: Progress | None = None,
    ) -> LatentGuard:
        """A new guard whose thresholds keep false-positive rates.

        - Prompts that packs were trained on are left out.
        - Long prompts and chats are left out if the guard has a chunking, which has a threshold of
          its own (``chunk_calibration``).

        Args:
            backend: The model.
            prompts: Like the traffic to come; harmless unless labelled harmful. Those that are
                serve the probabilities.
            max_fpr: Rate at which harmless prompts may be flagged.
            review_fpr: Rate at which they may be flagged or reviewed; None for no review.
            confidence: Of each Clopper-Pearson bound.
            segment_column: Where the segments of the prompts came from; noted for ``score``.
            progress: Called with the number of prompts read.

        Raises:
            GuardError: if there are too few prompts for a rate, or the guard was fitted on them.
        """
        rates = Rates(max_fpr, review_fpr, confidence)
        self.require_match(backend.fingerprint)
        used = self.calibration_prompts(prompts, rates)
        verdicts = list(self.scan(backend, used, progress=progress))
        return self.calibrate_from(used, verdicts, rates, column=segment_column)

    def calibration_prompts(self, prompts: Iterable[Prompt], rates: Rates) -> list[Prompt]:
        """Which prompts ``calibrate`` reads: short ones that no pack was trained on.

        Raises:
            GuardError: if there are too few for a rate, or the guard was fitted on them.
        """
        _, allowed = exclude_training_prompts(prompts, self.pack_training_prompts)
        short = [prompt for prompt in allowed if not self.is_chunked(prompt)]
        require_enough(short, rates)
        seen_by_probe = list(map(self.reading.prepare, short))
        fewest = smallest_n(rates.block, rates.confidence)
        require_unseen(seen_by_probe, self.all_training_digests, fewest)
        return short

    def calibrate_from(
        self,
        prompts: Sequence[Prompt],
        verdicts: Sequence[Verdict],
        rates: Rates,
        *,
        column: str | None = None,
    ) -> LatentGuard:
        """As ``calibrate``, from this guard's verdicts on prompts that may calibrate it."""
        calibration = fit_calibration(
            prompts,
            verdicts,
            rates,
            platt=self.platt,
            thresholds=self.thresholds,
            quadrants=self.quadrants,
            column=column,
        )
        harmless = [prompt for prompt in prompts if not prompt.harmful]
        bound = calibration.thresholds.common.block
        return replace(
            self,
            platt=calibration.platt,
            threshold=bound.threshold,
            bound=bound,
            fitted={**(self.fitted or {}), "calibration_sha256": digest_prompts(harmless)},
            thresholds=calibration.thresholds,
            quadrants=calibration.quadrants,
        )

    # ---- reading: plan, score, combine

    def scan(
        self,
        backend: Backend,
        prompts: Iterable[Prompt | str],
        *,
        progress: Progress | None = None,
    ) -> Iterator[Verdict]:
        """Yield a verdict for each prompt, in order.

        Raises:
            ModelMismatch: if the model is not the one the guard was fitted on.
            GuardError: if a state is not finite (fail closed).
        """
        for outcome in self.read(backend, prompts):
            if progress is not None:
                progress(1)
            yield outcome.verdict

    def read(self, backend: Backend, prompts: Iterable[Prompt | str]) -> Iterator[Outcome]:
        """As ``scan``, with what was measured on the version of each prompt that decided."""
        self.require_match(backend.fingerprint)
        score = partial(self.score, backend)
        return map(self.combine, score_plans(as_prompts(prompts), self.plan, score))

    def plan(self, prompt: Prompt) -> list[Variant]:
        """What is read of a prompt (``reading_plan.plan``)."""
        return plan(prompt, reading=self.reading, chunking=self.chunking, decode=self.deobfuscate)

    def score(self, backend: Backend, texts: Iterator[Prompt]) -> Iterator[VariantScore]:
        """Yield the score of each text of a plan, in order, in lazy batches."""
        if isinstance(backend, Scoring):
            yield from backend.scores(self, texts)
            return
        for states in backend.capture(texts, positions=self.positions, layers=self.probe.layers):
            yield from self.measure(states)

    def measure(self, states: States) -> list[VariantScore]:
        """Scores of states captured at ``positions`` and the probe's layers.

        Raises:
            GuardError: if a number is not finite.
        """
        states = states.select(self.probe.layers)
        scores = self.probe(fitting.slots(states, self.reading.positions)).double()
        beliefs = {axis.name: axis.layer_beliefs(states.at(axis.position)) for axis in self.axes}
        categories = self.categories.measure(states) if self.categories else [None] * len(states)
        if self.categories and self.categories.packs:
            scores = torch.maximum(scores, self.categories.pack_scores(states).amax(-1))
        deltas = {name: layers.mean(-1) for name, layers in beliefs.items()}
        if not all(torch.isfinite(values).all() for values in (scores, *deltas.values())):
            raise GuardError(NOT_FINITE)
        return [
            VariantScore(
                score=float(scores[row]),
                beliefs={name: float(values[row]) for name, values in deltas.items()},
                layer_beliefs={name: layers[row] for name, layers in beliefs.items()},
                categories=categories[row],
            )
            for row in range(len(states))
        ]

    def combine(self, scored: ScoredPlan) -> Outcome:
        """The verdict on a prompt from the scores of its plan (``reading_plan.combine``)."""
        return combine(scored, self.chunking, self.decide, tie=TIE * self.spread)

    def judge(self, states: States) -> list[Verdict]:
        """Verdicts on states captured at ``positions``, each prompt read as it stands and whole."""
        scores = self.measure(states)
        return [
            self.decide(prompt, Version((), score, ()))
            for prompt, score in zip(states.prompts, scores, strict=True)
        ]

    def decide(self, prompt: Prompt, version: Version) -> Verdict:
        """The verdict on one version of a prompt.

        Raises:
            GuardError: if a number is not finite.
        """
        evidence = version.evidence
        score = version.whole.score
        if evidence and self.chunking:
            units = dict(threshold=self.threshold, spread=self.spread)
            evidence = self.chunking.in_guard_units(evidence, **units)
            score = max(one.score for one in evidence)
        if not all(map(math.isfinite, (score, *version.whole.beliefs.values()))):
            raise GuardError(NOT_FINITE)
        decision = self._decision(prompt, score, has_evidence=bool(evidence))
        flagged = decision == "block"
        categories = version.whole.categories
        verdict = Verdict(
            id=prompt.id,
            score=score,
            probability=self.probability(score),
            flagged=flagged,
            beliefs=dict(version.whole.beliefs),
            decision=decision,
            category=nearest_category(categories, score=score, flagged=flagged),
            category_scores=dict(categories.scores) if categories else {},
            evidence=tuple(evidence),
            calibrated=self._is_calibrated(has_evidence=bool(evidence)),
        )
        if self.quadrants is None:
            return verdict
        return replace(verdict, quadrant=self.quadrants.quadrant(verdict))

    def _decision(self, prompt: Prompt, score: float, *, has_evidence: bool) -> Decision:
        if score > self.threshold_for(prompt.segment, has_evidence=has_evidence):
            return "block"
        if self.thresholds is None or has_evidence:
            return "allow"
        review = self.thresholds.for_segment(prompt.segment).review
        return "review" if review and score > review.threshold else "allow"

    def _is_calibrated(self, *, has_evidence: bool) -> bool:
        bound = self.chunking.bound if self.chunking and has_evidence else self.bound
        return bound is not None

    def threshold_for(self, segment: str | None, *, has_evidence: bool) -> float:
        """What a score is compared with: the threshold of the segment, if it has its own.

        Args:
            segment: Of the prompt.
            has_evidence: Whether it was read by chunks; these have one threshold, which evidence
                is moved to the guard's by.
        """
        if self.thresholds is None or has_evidence:
            return self.threshold
        own = self.thresholds.for_segment(segment)
        return self.threshold if own is self.thresholds.common else own.block.threshold

    def probability(self, score: float) -> float:
        """The probability of harmful for a score, where both classes are equally frequent."""
        if self.thresholds and self.thresholds.isotonic:
            return float(self.thresholds.isotonic(np.array([score]))[0])
        slope, intercept = self.platt
        return float(expit(slope * score + intercept))

    def is_chunked(self, prompt: Prompt) -> bool:
        """Whether it reads this prompt by chunks: it is long, or a chat."""
        return self.chunking is not None and self.chunking.applies_to(prompt)

    @property
    def positions(self) -> tuple[str, ...]:
        """Every position that the probe or an axis reads."""
        return tuple(
            dict.fromkeys([*self.reading.positions, *(axis.position for axis in self.axes)])
        )

    # ---- leakage

    @property
    def pack_training_prompts(self) -> TrainingPrompts:
        """The user's harmless prompts that packs were trained on, which never calibrate."""
        return self.categories.training_prompts if self.categories else TrainingPrompts()

    @property
    def all_training_digests(self) -> list[int]:
        """Of all that the guard was fitted on, and of the examples of its packs."""
        packs = self.categories.packs.values() if self.categories else ()
        return [*self.training_digests.tolist(), *(d for p in packs for d in p.harmful_digests)]

    # ---- the model that it is bound to

    def require_match(self, found: Fingerprint) -> None:
        """Raise ``ModelMismatch``, saying what differs, unless the model is the guard's own."""
        if reason := explain_mismatch(self.fingerprint, found):
            raise ModelMismatch(reason)

    def verify_model(self, backend: Backend) -> None:
        """Raise ``ModelMismatch`` unless fingerprint and canary scores are as when fitted."""
        self.require_match(backend.fingerprint)
        shift = self.shift_to(self.rebind(backend))
        if shift.is_notable:
            raise ModelMismatch(shift.complaint)

    def shift_to(self, rebound: LatentGuard) -> Shift:
        """How far the canaries' scores moved on the model that this guard was rebound to."""
        return Shift.of(
            [canary.score for canary in self.canaries],
            [canary.score for canary in rebound.canaries],
            spread=self.spread,
            threshold=self.threshold,
            differences=self.fingerprint.differences(rebound.fingerprint),
        )

    def rebind(self, backend: Backend) -> LatentGuard:
        """The same guard, bound to another model: its canaries scored anew, its promise dropped.

        Raises:
            ModelMismatch: if the model has not the layers, width or positions that the guard reads.
        """
        if self.fingerprint.differences(backend.fingerprint):
            steps = [int(p.removeprefix("post+")) for p in self.positions if p.startswith("post+")]
            require_readable(
                backend,
                width=self.probe.weight.shape[-1],
                layer=max(self.probe.layers),
                post=max(steps, default=0),
            )
        there = replace(
            self,
            fingerprint=backend.fingerprint,
            bound=None,
            fitted={**(self.fitted or {}), "fitted_on": asdict(self.fingerprint)},
            chunking=self.chunking and self.chunking.without_promise(),
            thresholds=self.thresholds and self.thresholds.without_promise(),
            quadrants=self.quadrants and self.quadrants.without_promise(),
        )
        return there.with_canaries(backend)

    def accept_model(self, backend: Backend) -> LatentGuard:
        """The guard itself on its own model, else bound to the model that it met (``rebind``)."""
        there = self.rebind(backend)
        shift = self.shift_to(there)
        return there if shift.differences or shift.is_notable else self

    # ---- what it is, on disk and for people

    @property
    def promise(self) -> str:
        """What the threshold promises, in words."""
        return str(self.bound) if self.bound else "not calibrated, so nothing is promised"

    @property
    def notes(self) -> list[str]:
        """Paragraphs and tables on what else it does, in Markdown."""
        notes = list[str]()
        if self.deobfuscate:
            notes.append(
                f"Text that looks obfuscated ({', '.join(OBFUSCATIONS)}) is read as it stands and "
                "decoded; the most severe reading counts, and the verdict names what was decoded."
            )
        for part in (self.chunking, self.thresholds, self.quadrants, self.categories):
            notes += part.notes() if part else []
        return notes

    @property
    def card(self) -> str:
        """The model card, in Markdown."""
        return model_card(self.to_dict()[0], promise=self.promise, notes=self.notes)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that makes its verdicts."""
        record, tensors = self.to_dict()
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write ``guard.json``, ``guard.safetensors`` and a model card."""
        write_folder(folder, *self.to_dict(), self.card)

    @staticmethod
    def load(
        folder: str | Path, backend: Backend | None = None, *, allow_mismatch: bool = False
    ) -> LatentGuard:
        """Read a guard; with a backend, also check that it is the guard's model (``verify_model``).

        Args:
            folder: What ``save`` wrote.
            backend: The model that it is to guard.
            allow_mismatch: Go on with another model, bound to it (``rebind``).

        Raises:
            GuardError: if the folder is not a whole guard of a known schema.
            ModelMismatch: if the backend is not the model that the guard was fitted on.
        """
        record, tensors = read_folder(folder)
        try:
            guard = LatentGuard.from_dict(record, tensors)
        except (LookupError, TypeError, ValueError, AttributeError, GuardError) as error:
            raise GuardError(
                f"{folder} holds a damaged guard ({error!r}); restore it or fit it again."
            ) from None
        if backend is None:
            return guard
        if allow_mismatch:
            return guard.accept_model(backend)
        guard.verify_model(backend)
        return guard

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        tensors = {"weight": self.probe.weight, "training_digests": self.training_digests}
        for axis in self.axes:
            tensors |= {f"{axis.name}.{pole}": getattr(axis, pole) for pole in POLES}
        parts = dict[str, dict[str, Any] | None](thresholds=None, categories=None)
        for name, part in (("thresholds", self.thresholds), ("categories", self.categories)):
            if part is not None:
                parts[name], own = part.to_dict()
                tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        record = {
            "fingerprint": asdict(self.fingerprint),
            "reading": asdict(self.reading),
            "probe": {
                "kind": self.probe.kind,
                "layers": self.probe.layers,
                "bias": self.probe.bias,
            },
            "axes": [
                {"name": axis.name, "position": axis.position, "counts": axis.counts}
                for axis in self.axes
            ],
            "threshold": self.threshold,
            "bound": asdict(self.bound) if self.bound else None,
            "platt": self.platt,
            "spread": self.spread,
            "canaries": [asdict(canary) for canary in self.canaries],
            "fitted": self.fitted,
            "deobfuscation": {"rules": RULES} if self.deobfuscate else None,
            "chunking": self.chunking.to_dict() if self.chunking else None,
            "quadrants": self.quadrants.to_dict() if self.quadrants else None,
            **parts,
        }
        return record, tensors

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LatentGuard:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, GuardError: if it is damaged.
        """
        require_sound(record, tensors)
        probe = record["probe"]
        slope, intercept = record["platt"]
        layers = tuple(probe["layers"])
        thresholds = _own("thresholds", tensors)
        categories = _own("categories", tensors)
        return LatentGuard(
            reading=Reading(record["reading"]["name"], tuple(record["reading"]["positions"])),
            probe=Probe(probe["kind"], layers, tensors["weight"], float(probe["bias"])),
            axes=tuple(_axis(axis, layers, tensors) for axis in record["axes"]),
            fingerprint=Fingerprint(**record["fingerprint"]),
            platt=(float(slope), float(intercept)),
            spread=float(record["spread"]),
            canaries=tuple(Canary(**canary) for canary in record["canaries"]),
            threshold=float(record["threshold"]),
            bound=_optional(record["bound"], lambda bound: Bound(**bound)),
            fitted=record["fitted"],
            training_digests=tensors["training_digests"],
            deobfuscate=record["deobfuscation"] is not None,
            chunking=_optional(record["chunking"], Chunking.from_dict),
            thresholds=_optional(record["thresholds"], Thresholds.from_dict, thresholds),
            quadrants=_optional(record["quadrants"], Quadrants.from_dict),
            categories=_optional(record["categories"], Categories.from_dict, categories),
        )


def _axis(
    record: Mapping[str, Any], layers: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> Axis:
    positive, negative = (tensors[f"{record['name']}.{pole}"] for pole in POLES)
    counts = tuple(record["counts"])
    return Axis(record["name"], record["position"], layers, positive, negative, counts)


def _optional(record: Any, read: Callable[..., T], *tensors: Mapping[str, Tensor]) -> T | None:
    return None if record is None else read(record, *tensors)


def _own(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part, by their names in it."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
