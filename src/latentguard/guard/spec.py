"""GuardSpec: all that makes a guard's verdicts, and how it decides; no model is needed.

A spec is data: ``to_dict`` and ``from_dict`` turn it into JSON and tensors and back. What it says
of a prompt follows from what was measured (``reading_plan``). ``LatentGuard`` adds the model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Int
from scipy.special import expit
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.guard.adaptation import Adaptation, Reference
from latentguard.guard.artifact import (
    OPTIONAL_KEYS,
    POLES,
    card_head,
    model_card,
    read_field,
    read_optional,
    require_sound,
)
from latentguard.guard.calibrate import fit_calibration, require_enough
from latentguard.guard.categories import Categories, nearest_category
from latentguard.guard.chunking import Chunking
from latentguard.guard.compatibility import Canary
from latentguard.guard.early_exit import EarlyExit
from latentguard.guard.leakage import (
    TrainingPrompts,
    exclude_training_prompts,
    require_unseen,
)
from latentguard.guard.operating_point import label_of_rate
from latentguard.guard.quadrants import Quadrants
from latentguard.guard.reading_plan import (
    Outcome,
    ScoredPlan,
    Variant,
    VariantScore,
    Version,
    combine,
    plan,
)
from latentguard.guard.replies import ReplyProbe
from latentguard.guard.thresholds import Rates, Thresholds
from latentguard.guard.verdict import Decision, Verdict
from latentguard.probes.axis import Axis
from latentguard.probes.fitting import slots
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt
from latentguard.states import (
    Fingerprint,
    Reading,
    States,
    TokenQueries,
    attended_slots,
    digest_prompts,
)
from latentguard.stats.bounds import Bound, smallest_n
from latentguard.text.deobfuscation import OBFUSCATIONS, RULES

TIE = 1e-4
"""Versions of a prompt whose scores differ by less, in standard deviations, are alike."""

NOT_FINITE = (
    "A score or a belief is not a finite number, so no verdict can be given; use bfloat16 or "
    "float32 instead of float16."
)


@dataclass(frozen=True, eq=False)
class GuardSpec:
    """What a guard is; immutable."""

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

    replies: ReplyProbe | None = None
    """How it judges what the model says; None judges prompts only."""

    early_exit: EarlyExit | None = None
    """When prompts of files leave the pass early; None reads each whole."""

    reference: Reference | None = None
    """Built-in prompts as it reads them, so that it learns from labels without reading them."""

    adaptation: Adaptation | None = None
    """What it has learned from labels; None if it has learned nothing."""

    # ---- what it reads

    @property
    def positions(self) -> tuple[str, ...]:
        """Every position that the probe or an axis reads."""
        return tuple(
            dict.fromkeys([*self.reading.positions, *(axis.position for axis in self.axes)])
        )

    def plan(self, prompt: Prompt) -> list[Variant]:
        """What is read of a prompt (``reading_plan.plan``)."""
        return plan(prompt, reading=self.reading, chunking=self.chunking, decode=self.deobfuscate)

    # ---- how it decides

    def measure(self, states: States) -> list[VariantScore]:
        """Scores of states captured at ``positions`` and the probe's layers.

        Raises:
            GuardError: if a number is not finite.
        """
        states = states.select(self.probe.layers)
        scores = self.probe(slots(states, self.reading.positions)).double()
        beliefs = {axis.name: axis.layer_beliefs(states.at(axis.position)) for axis in self.axes}
        categories = self.categories.measure(states) if self.categories else [None] * len(states)
        if self.categories and self.categories.packs:
            packs = [one.pack_score for one in categories if one is not None]
            scores = torch.maximum(scores, torch.tensor(packs, dtype=torch.float64))
        deltas = {name: layers.mean(-1) for name, layers in beliefs.items()}
        if not all(torch.isfinite(values).all() for values in (scores, *deltas.values())):
            raise GuardError(NOT_FINITE)
        delta_rows = {name: values.tolist() for name, values in deltas.items()}
        layer_rows = {name: layers.unbind(0) for name, layers in beliefs.items()}
        return [
            VariantScore(
                score=score,
                beliefs={name: rows[n] for name, rows in delta_rows.items()},
                layer_beliefs={name: rows[n] for name, rows in layer_rows.items()},
                categories=categories[n],
            )
            for n, score in enumerate(scores.tolist())
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
            evidence = self.chunking.in_guard_units(evidence, self.threshold)
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
            operating_point=self.operating_point,
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

    @property
    def lowest_threshold(self) -> float:
        """Scores that are not above it are allowed, whatever the segment."""
        return self.thresholds.lowest if self.thresholds else self.threshold

    @property
    def usable_early_exit(self) -> EarlyExit | None:
        """Its early exit, unless the guard was changed since that was calibrated."""
        early = self.early_exit
        return early if early and replace(self, early_exit=None).digest == early.guard else None

    def require_reply_probe(self) -> ReplyProbe:
        """How it judges replies.

        Raises:
            GuardError: if it does not.
        """
        if self.replies is None:
            raise GuardError(
                "This guard does not judge replies. Fit one that does: latentguard fit --replies "
                "FILE --out FOLDER"
            )
        return self.replies

    def is_chunked(self, prompt: Prompt) -> bool:
        """Whether it reads this prompt by chunks: it is long, or a chat."""
        return self.chunking is not None and self.chunking.applies_to(prompt)

    # ---- calibrating

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
    ) -> Self:
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

    # ---- what it is, on disk and for people

    @property
    def operating_point(self) -> str | None:
        """What the threshold was chosen for, as verdicts name it; None without a calibration."""
        if self.bound is None:
            return None
        point = self.thresholds.point if self.thresholds else None
        return point.label if point else label_of_rate(self.bound.max_fpr)

    @property
    def promise(self) -> str:
        """What the threshold promises, in words."""
        if self.bound is None:
            return "not calibrated, so nothing is promised"
        point = self.thresholds.point if self.thresholds else None
        if self.thresholds and self.thresholds.second_opinion:
            return f"{self.bound}, with the second opinion {self.thresholds.second_opinion.name}"
        if point is None or point.traffic is None:
            return str(self.bound)
        traffic = point.traffic
        return (
            f"an estimate, and no bound: of the harmless prompts of the traffic {traffic.fpr} are "
            f"flagged, of the harmful ones {traffic.recall}; n = {traffic.n} unlabelled prompts, "
            f"{traffic.share} of them harmful"
        )

    @property
    def notes(self) -> list[str]:
        """Paragraphs and tables on what else it does, in Markdown."""
        notes = [
            f"Text that looks obfuscated ({', '.join(OBFUSCATIONS)}) is read as it stands and "
            "decoded; the most severe reading counts, and the verdict names what was decoded."
        ] * self.deobfuscate
        parts = (self.chunking, self.thresholds, self.quadrants, self.categories, self.replies)
        for part in (self.adaptation, *parts, self.usable_early_exit):
            notes += part.notes() if part else []
        return notes

    @property
    def card(self) -> str:
        """The model card, in Markdown."""
        return model_card(self.to_dict()[0], promise=self.promise, notes=self.notes)

    def hub_card(self, *, license: str | None = None, notes: Sequence[str] = ()) -> str:
        """The model card with the YAML that the Hugging Face Hub reads.

        Args:
            license: Of the guard, such as ``apache-2.0``; left out if it is unknown.
            notes: Further paragraphs, in Markdown.
        """
        head = card_head(self.to_dict()[0], license=license)
        return head + self.card + "".join(f"\n{note}\n" for note in notes)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that makes its verdicts."""
        record, tensors = replace(self, reference=None, adaptation=None).to_dict()
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        tensors = {"weight": self.probe.weight, "training_digests": self.training_digests}
        for axis in self.axes:
            tensors |= {f"{axis.name}.{pole}": getattr(axis, pole) for pole in POLES}
        record = {
            "fingerprint": asdict(self.fingerprint),
            "reading": {"name": self.reading.name, "positions": self.reading.positions},
            "probe": {name: getattr(self.probe, name) for name in ("kind", "layers", "bias")},
            "axes": [
                {"name": axis.name, "position": axis.position, "counts": axis.counts}
                for axis in self.axes
            ],
            "threshold": self.threshold,
            "bound": asdict(self.bound) if self.bound else None,
            "platt": self.platt,
            "spread": self.spread,
            "canaries": [
                asdict(canary) | {"flagged": canary.score > self.threshold}
                for canary in self.canaries
            ],
            "fitted": self.fitted,
            "deobfuscation": {"rules": RULES} if self.deobfuscate else None,
            "chunking": self.chunking.to_dict() if self.chunking else None,
            "quadrants": self.quadrants.to_dict() if self.quadrants else None,
        }
        parts = {
            "thresholds": self.thresholds,
            "categories": self.categories,
            "queries": self.reading.queries,
            "replies": self.replies,
            "early_exit": self.early_exit,
            "reference": self.reference,
            "adaptation": self.adaptation,
        }
        for name, part in parts.items():
            if part is not None:
                record[name], own = part.to_dict()
                tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
            elif name not in OPTIONAL_KEYS:
                record[name] = None
        return record, tensors

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, GuardError: if it is damaged.
        """
        require_sound(record, tensors)
        name, probe = record["reading"]["name"], record["probe"]
        slope, intercept = record["platt"]
        layers = tuple(probe["layers"])
        positions = tuple(record["reading"]["positions"])
        queries = read_field("queries", TokenQueries.from_dict, record, tensors)
        attended_slots(positions, layers, queries)
        own = queries.positions if queries else ()
        has_width = queries is None or queries.vectors.shape[1] == tensors["weight"].shape[1]
        if bool(own) != (name == "attended") or not has_width or not set(own) <= set(positions):
            raise ValueError("the queries are not those that the reading needs")
        return cls(
            reading=Reading(name, positions, queries),
            probe=Probe(probe["kind"], layers, tensors["weight"], float(probe["bias"])),
            axes=tuple(Axis.from_dict(axis, layers, tensors) for axis in record["axes"]),
            fingerprint=Fingerprint(**record["fingerprint"]),
            platt=(float(slope), float(intercept)),
            spread=float(record["spread"]),
            canaries=tuple(Canary(one["text"], one["score"]) for one in record["canaries"]),
            threshold=float(record["threshold"]),
            bound=read_optional(record["bound"], Bound.from_dict),
            fitted=record["fitted"],
            training_digests=tensors["training_digests"],
            deobfuscate=record["deobfuscation"] is not None,
            chunking=read_optional(record["chunking"], Chunking.from_dict),
            thresholds=read_field("thresholds", Thresholds.from_dict, record, tensors),
            quadrants=read_optional(record["quadrants"], Quadrants.from_dict),
            categories=read_field("categories", Categories.from_dict, record, tensors),
            replies=read_field("replies", ReplyProbe.from_dict, record, tensors),
            early_exit=read_field("early_exit", EarlyExit.from_dict, record, tensors),
            reference=read_field("reference", Reference.from_dict, record, tensors),
            adaptation=read_field("adaptation", Adaptation.from_dict, record, tensors),
        )
