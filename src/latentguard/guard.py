"""LatentGuard: a reading, a readout and a threshold, bound to one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.special import expit

from latentguard import fitting, readings
from latentguard.artifact import POLES, model_card, read_folder, require_sound, write_folder
from latentguard.axes import Axis
from latentguard.canaries import TOLERANCE, Canary, canary_prompts
from latentguard.errors import GuardError, ModelMismatch
from latentguard.metrics import Bound, threshold_for_fpr
from latentguard.prompts import Prompt
from latentguard.readings import Reading
from latentguard.readouts import Kind, Readout, require_kind
from latentguard.states import Backend, Fingerprint, Progress, States, digest_prompts


@dataclass(frozen=True)
class Verdict:
    """What a guard says of one prompt."""

    id: str
    """Of the prompt."""

    score: float
    """Higher is more harmful; the unit is the readout's own."""

    probability: float
    """Platt-scaled score: probability of harmful where both classes are equally frequent."""

    flagged: bool
    """Whether the score is above the threshold."""

    beliefs: dict[str, float]
    """Delta of each axis (equations 3 and 4), over the guard's layers."""


@dataclass(frozen=True, eq=False)
class LatentGuard:
    """A guard for one model; immutable."""

    reading: Reading
    """Where it reads."""

    readout: Readout
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

    @staticmethod
    def fit(
        backend: Backend,
        prompts: Iterable[Prompt],
        *,
        reading: str = readings.DEFAULT,
        readout: Kind = "linear",
        progress: Progress | None = None,
    ) -> LatentGuard:
        """Capture the states of labelled prompts and fit a guard.

        Args:
            backend: The model.
            prompts: Labelled harmful or harmless.
            reading: ``t_inst``, ``t_post``, ``post+k``, ``sealed`` or ``span``.
            readout: ``centroid`` (the paper) or ``linear``.
            progress: Called with the number of prompts captured.

        Raises:
            GuardError: if a prompt has no label, a class is missing, or a state is not finite.
        """
        where = Reading.of(reading, backend.post)
        require_kind(readout)
        prompts = fitting.require_labels(prompts)
        states = fitting.capture(backend, where, prompts, progress=progress)
        return LatentGuard.from_states(backend, states, where, readout)

    @staticmethod
    def from_states(
        backend: Backend, states: States, reading: Reading, readout: Kind = "linear"
    ) -> LatentGuard:
        """Fit a guard on states that were captured already, all layers, at the right positions."""
        fit = fitting.fit_readout(states, reading, readout)
        labels = [bool(p.harmful) for p in states.prompts]
        guard = LatentGuard(
            reading=reading,
            readout=fit.readout,
            axes=fitting.fit_axes(states, fit.readout.layers),
            fingerprint=backend.fingerprint,
            platt=fitting.fit_platt(fit.held_out, labels),
            spread=float(fit.held_out.std()),
            fitted=fitting.provenance(states, fit),
        )
        texts = canary_prompts()
        scores = [v.score for v in guard.scan(backend, texts)]
        canaries = tuple(Canary(p.text, s) for p, s in zip(texts, scores, strict=True))
        return replace(guard, canaries=canaries)

    def calibrate(
        self,
        backend: Backend,
        harmless: Iterable[Prompt],
        *,
        max_fpr: float = 0.01,
        confidence: float = 0.95,
        progress: Progress | None = None,
    ) -> LatentGuard:
        """A new guard whose threshold keeps a false-positive rate, from harmless prompts.

        Raises:
            GuardError: if there are too few prompts for the rate; says how many are needed.
        """
        prompts = list(harmless)
        self.require_match(backend.fingerprint)
        threshold_for_fpr(range(len(prompts)), max_fpr, confidence)  # too few? say so first
        scores = [v.score for v in self.scan(backend, prompts, progress=progress)]
        bound = threshold_for_fpr(scores, max_fpr, confidence)
        record = {**(self.fitted or {}), "calibration_sha256": digest_prompts(prompts)}
        return replace(self, threshold=bound.threshold, bound=bound, fitted=record)

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
        self.require_match(backend.fingerprint)
        ready = (self.reading.prepare(_prompt(p, n)) for n, p in enumerate(prompts, start=1))
        batches = backend.capture(
            ready, positions=self.positions, layers=self.readout.layers, progress=progress
        )
        for states in batches:
            yield from self.judge(states)

    @property
    def positions(self) -> tuple[str, ...]:
        """Every position that the readout or an axis reads."""
        return tuple(dict.fromkeys([*self.reading.positions, *(a.position for a in self.axes)]))

    def judge(self, states: States) -> Iterator[Verdict]:
        """Verdicts for states captured at ``positions`` and at least the readout's layers."""
        states = states.select(self.readout.layers)
        scores = self.readout(fitting.slots(states, self.reading.positions)).double()
        beliefs = {axis.name: axis.belief(states.at(axis.position)) for axis in self.axes}
        if not all(torch.isfinite(values).all() for values in (scores, *beliefs.values())):
            raise GuardError(
                "A score or a belief is not a finite number, so no verdict can be given; use "
                "bfloat16 or float32 instead of float16."
            )
        chances = expit(self.platt[0] * scores.numpy() + self.platt[1])
        for i, prompt in enumerate(states.prompts):
            score = float(scores[i])
            believed = {name: float(values[i]) for name, values in beliefs.items()}
            yield Verdict(prompt.id, score, float(chances[i]), score > self.threshold, believed)

    def require_match(self, found: Fingerprint) -> None:
        """Raise ``ModelMismatch``, saying what differs, unless the model is the guard's own."""
        different = self.fingerprint.differences(found)
        if different:
            raise ModelMismatch(
                f"This guard was fitted on '{self.fingerprint.model}' and met '{found.model}': "
                f"{'; '.join(different)}. Use that model, or fit a guard for this one."
            )

    def check(self, backend: Backend) -> None:
        """Raise ``ModelMismatch`` unless fingerprint and canary scores are as when fitted."""
        texts = [canary.text for canary in self.canaries]
        verdicts = self.scan(backend, texts)
        moved = [abs(v.score - c.score) for v, c in zip(verdicts, self.canaries, strict=True)]
        if max(moved, default=0.0) > TOLERANCE * self.spread:
            raise ModelMismatch(
                f"The model looks like the guard's own but scores the canary prompts differently: "
                f"by up to {max(moved) / self.spread:.2f} standard deviations, allowed "
                f"{TOLERANCE}. Its weights or the software under it changed; fit again."
            )

    @property
    def promise(self) -> str:
        """What the threshold promises, in words."""
        return str(self.bound) if self.bound else "not calibrated, so nothing is promised"

    @property
    def digest(self) -> str:
        """SHA-256 of everything that makes its verdicts."""
        record, tensors = self._packed()
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write ``guard.json``, ``guard.safetensors`` and a model card."""
        record, tensors = self._packed()
        write_folder(folder, record, tensors, model_card(record, promise=self.promise))

    @staticmethod
    def load(folder: str | Path, backend: Backend | None = None) -> LatentGuard:
        """Read a guard; with a backend, also check that it is the guard's model (``check``).

        Raises:
            GuardError: if the folder is not a whole guard of a known schema.
            ModelMismatch: if the backend is not the model that the guard was fitted on.
        """
        record, tensors = read_folder(folder)
        try:
            guard = _unpacked(record, tensors)
        except (LookupError, TypeError, ValueError, GuardError) as error:
            raise GuardError(
                f"{folder} holds a damaged guard ({error!r}); restore it or fit it again."
            ) from None
        if backend is not None:
            guard.check(backend)
        return guard

    def _packed(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors = {"weight": self.readout.weight}
        for axis in self.axes:
            tensors |= {f"{axis.name}.{pole}": getattr(axis, pole) for pole in POLES}
        record = {
            "fingerprint": asdict(self.fingerprint),
            "reading": asdict(self.reading),
            "readout": dict(
                kind=self.readout.kind, layers=self.readout.layers, bias=self.readout.bias
            ),
            "axes": [dict(name=a.name, position=a.position, counts=a.counts) for a in self.axes],
            "threshold": self.threshold,
            "bound": asdict(self.bound) if self.bound else None,
            "platt": self.platt,
            "spread": self.spread,
            "canaries": [asdict(canary) for canary in self.canaries],
            "fitted": self.fitted,
        }
        return record, tensors


def _unpacked(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LatentGuard:
    require_sound(record, tensors)
    readout, reading, (slope, intercept) = record["readout"], record["reading"], record["platt"]
    layers = tuple(readout["layers"])
    axes = []
    for axis in record["axes"]:
        plus, minus = (tensors[f"{axis['name']}.{pole}"] for pole in POLES)
        counts = tuple(axis["counts"])
        axes.append(Axis(axis["name"], axis["position"], layers, plus, minus, counts))
    return LatentGuard(
        reading=Reading(reading["name"], tuple(reading["positions"])),
        readout=Readout(readout["kind"], layers, tensors["weight"], float(readout["bias"])),
        axes=tuple(axes),
        fingerprint=Fingerprint(**record["fingerprint"]),
        platt=(float(slope), float(intercept)),
        spread=float(record["spread"]),
        canaries=tuple(Canary(**canary) for canary in record["canaries"]),
        threshold=float(record["threshold"]),
        bound=Bound(**record["bound"]) if record["bound"] else None,
        fitted=record["fitted"],
    )


def _prompt(item: Prompt | str, number: int) -> Prompt:
    return item if isinstance(item, Prompt) else Prompt(item, id=str(number))
