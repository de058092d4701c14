"""LatentGuard: a reading, a probe and a threshold, bound to one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import expit
from torch import Tensor

from latentguard.errors import GuardError, ModelMismatch
from latentguard.guard import calibrate as calibrating
from latentguard.guard.canaries import Canary, canary_prompts
from latentguard.guard.categories import Categories
from latentguard.guard.chunking import Piece, Windows, read_apart, with_pieces
from latentguard.guard.compatibility import Shift, explain, require_like
from latentguard.guard.leakage import apart, mark, require_apart
from latentguard.guard.obfuscations import Obfuscations, read_through, worse
from latentguard.guard.probabilities import fit_platt
from latentguard.guard.quadrants import Quadrants
from latentguard.guard.spec import Contents
from latentguard.guard.thresholds import Rates
from latentguard.guard.verdict import Decision, Evidence, Verdict
from latentguard.probes import fitting
from latentguard.probes.probe import Kind, layers_of, require_kind
from latentguard.prompts import Prompt, as_prompts
from latentguard.states import (
    DEFAULT_READING,
    Backend,
    Fingerprint,
    Progress,
    Reading,
    Scoring,
    States,
)
from latentguard.stats.bounds import smallest_n


@dataclass(frozen=True, eq=False)
class LatentGuard(Contents):
    """A guard for one model; immutable."""

    @staticmethod
    def fit(
        backend: Backend,
        prompts: Iterable[Prompt],
        *,
        reading: str = DEFAULT_READING,
        probe: Kind = "linear",
        progress: Progress | None = None,
    ) -> LatentGuard:
        """Capture the states of labelled prompts and fit a guard.

        Args:
            backend: The model.
            prompts: Labelled harmful or harmless.
            reading: ``t_inst``, ``t_post``, ``post+k``, ``sealed``, ``span`` or ``pooled``.
            probe: ``centroid`` (the paper) or ``linear``.
            progress: Called with the number of prompts captured.

        Raises:
            GuardError: if a prompt has no label, a class is missing, or a state is not finite.
        """
        where = Reading.of(reading, backend.post)
        require_kind(probe)
        prompts, layers = fitting.require_labels(prompts), layers_of(probe, backend.depth)
        states = fitting.capture(backend, where, prompts, layers=layers, progress=progress)
        return LatentGuard.from_states(backend, states, where, probe)

    @staticmethod
    def from_states(
        backend: Backend, states: States, reading: Reading, probe: Kind = "linear"
    ) -> LatentGuard:
        """Fit a guard on states that were captured already (``fitting.fit_probe``)."""
        fit = fitting.fit_probe(states, reading, probe, backend.depth)
        labels = [bool(p.harmful) for p in states.prompts]
        guard = LatentGuard(
            reading=reading,
            probe=fit.probe,
            axes=fitting.fit_axes(states, fit.probe.layers),
            fingerprint=backend.fingerprint,
            platt=fit_platt(fit.held_out, np.array(labels)),
            spread=float(fit.held_out.std()),
            fitted=fitting.provenance(states, fit),
            learnt=torch.tensor([mark(p) for p in states.prompts]),
        )
        part = states.select(guard.probe.layers)
        guard = guard.with_part(Categories.fit(part, reading.positions, fit.held_out))
        if len(guard.axes) > 1:
            guard = guard.with_part(Quadrants())
        if probe == "linear":  # the paper's guard reads what is served, and nothing else
            guard = guard.with_part(Obfuscations())
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

        Args:
            backend: The model.
            prompts: Like the traffic to come; harmless unless labelled harmful. Those that are
                serve the probabilities. Those that packs are held against are left out.
            max_fpr: Rate at which harmless prompts may be flagged.
            review_fpr: Rate at which they may be flagged or reviewed; None for no review.
            confidence: Of each Clopper-Pearson bound.
            segment_column: Where the segments of the prompts came from; noted for ``score``.
            progress: Called with the number of prompts read.

        Long ones are passed over if the guard has windows, which have a threshold of their own.

        Raises:
            GuardError: if there are too few prompts for a rate, or the guard was fitted on them.
        """
        rates, prompts = Rates(max_fpr, review_fpr, confidence), apart(prompts, self.held)[1]
        known = [p for p in prompts if not self.reads_pieces(p)]
        self.require_match(backend.fingerprint)
        calibrating.require_enough(known, rates)
        fewest = smallest_n(max_fpr, confidence)
        require_apart(list(map(self.reading.prepare, known)), self.marks, fewest)
        verdicts = list(self.scan(backend, known, progress=progress))
        return calibrating.calibrated(self, known, verdicts, rates, segment_column)

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
        known, read = self.part(Obfuscations) is not None, partial(self._read, backend)
        for verdict in read_through(known, as_prompts(prompts), read, worse):
            if progress is not None:
                progress(1)
            yield verdict

    def _read(self, backend: Backend, prompts: Iterator[Prompt]) -> Iterator[Verdict]:
        """Verdicts on prompts as they stand."""
        if isinstance(backend, Scoring):
            return backend.verdicts(self, map(self.reading.prepare, prompts))
        short, long = partial(self._read_short, backend), partial(self._read_long, backend)
        return read_apart(self.part(Windows), prompts, short, long)

    def _read_short(self, backend: Backend, prompts: Iterator[Prompt]) -> Iterator[Verdict]:
        ready, layers = map(self.reading.prepare, prompts), self.probe.layers
        for states in backend.capture(ready, positions=self.positions, layers=layers):
            yield from self.judge(states)

    def _read_long(self, backend: Backend, prompt: Prompt) -> Verdict:
        return next(self.judge(*self.examine(backend, prompt)))

    def examine(self, backend: Backend, prompt: Prompt) -> tuple[States, list[Evidence]]:
        """Read a long prompt or a chat: the states of the whole, and what its pieces show.

        Raises:
            GuardError: if the guard has no windows.
        """
        windows = self.part(Windows)
        if windows is None:
            raise GuardError("This guard has no windows: fit it with 'latentguard fit --long'.")
        pieces = windows.pieces(prompt)
        states, scores = self.read_pieces(backend, prompt, pieces)
        return states, windows.evidence(pieces, scores, self.threshold, self.spread)

    def read_pieces(
        self, backend: Backend, prompt: Prompt, pieces: Sequence[Piece]
    ) -> tuple[States, list[float]]:
        """The states of a prompt, its score and that of each piece as a prompt of its own."""
        rows = with_pieces(prompt, pieces)
        how = dict(positions=self.positions, layers=self.probe.layers)
        whole, scores = None, list[float]()
        for states in backend.capture(map(self.reading.prepare, rows), **how):  # type: ignore[arg-type]
            whole = whole or replace(states, values=states.values[:1], prompts=states.prompts[:1])
            scores += self.raised(states, self.scores(states)).tolist()
        assert whole is not None
        return whole, scores

    def scores(self, states: States) -> Float[Tensor, "n"]:
        """The probe's own scores, without packs, of states captured at ``positions``, float64."""
        part = states.select(self.probe.layers)
        return self.probe(fitting.slots(part, self.reading.positions)).double()

    def raised(self, states: States, scores: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Scores as the parts leave them: the greatest of the probe's and those of the packs."""
        for part in self.parts:
            scores = part.adjust(states, scores)
        return scores

    def judge(self, states: States, evidence: Sequence[Evidence] = ()) -> Iterator[Verdict]:
        """Verdicts for states at ``positions``, the probe's layers; evidence is ``examine``'s."""
        states = states.select(self.probe.layers)
        beliefs = {axis.name: axis.belief(states.at(axis.position)) for axis in self.axes}
        yield from self.decide(states, self.scores(states), beliefs, evidence)

    def decide(
        self,
        states: States,
        scores: Float[Tensor, "n"],
        beliefs: Mapping[str, Float[Tensor, "n"]],
        evidence: Sequence[Evidence] = (),
    ) -> list[Verdict]:
        """Verdicts from the probe's scores and the axes' beliefs; GuardError if not finite."""
        scores = self.raised(states, scores)
        if evidence:
            scores = scores.new_tensor([max(e.score for e in evidence)])
        if not all(torch.isfinite(values).all() for values in (scores, *beliefs.values())):
            raise GuardError(
                "A score or a belief is not a finite number, so no verdict can be given; use "
                "bfloat16 or float32 instead of float16."
            )
        chances = expit(self.platt[0] * scores.numpy() + self.platt[1])
        verdicts = []
        for i, prompt in enumerate(states.prompts):
            score = float(scores[i])
            believed = {name: float(values[i]) for name, values in beliefs.items()}
            decision: Decision = "block" if (flagged := score > self.threshold) else "allow"
            known = prompt.id, score, float(chances[i]), flagged, believed, decision
            verdicts.append(Verdict(*known, evidence=tuple(evidence)))
        for part in self.parts:
            verdicts = part.judge(states, verdicts)
        return verdicts

    def require_match(self, found: Fingerprint) -> None:
        """Raise ``ModelMismatch``, saying what differs, unless the model is the guard's own."""
        if reason := explain(self.fingerprint, found):
            raise ModelMismatch(reason)

    def check(self, backend: Backend) -> None:
        """Raise ``ModelMismatch`` unless fingerprint and canary scores are as when fitted."""
        self.require_match(backend.fingerprint)
        shift = Shift.between(self, self.rebind(backend))
        if shift.notable:
            raise ModelMismatch(shift.complaint)

    def rebind(self, backend: Backend) -> LatentGuard:
        """The same guard, bound to another model: its canaries scored anew, its promise dropped.

        ``Shift.between(guard, rebound)`` says how far the canaries moved.

        Raises:
            ModelMismatch: if the model has not the layers, width or positions that the guard reads.
        """
        if self.fingerprint.differences(backend.fingerprint):
            require_like(self, backend)
        record = {**(self.fitted or {}), "fitted_on": asdict(self.fingerprint)}
        parts = tuple(part.rebound() for part in self.parts)
        there = replace(
            self, fingerprint=backend.fingerprint, bound=None, fitted=record, parts=parts
        )
        return there.with_canaries(backend)

    @staticmethod
    def load(
        folder: str | Path, backend: Backend | None = None, *, allow_mismatch: bool = False
    ) -> LatentGuard:
        """Read a guard; with a backend, also check that it is the guard's model (``check``).

        Args:
            folder: What ``save`` wrote.
            backend: The model that it is to guard.
            allow_mismatch: Go on with another model, bound to it (``rebind``).

        Raises:
            GuardError: if the folder is not a whole guard of a known schema.
            ModelMismatch: if the backend is not the model that the guard was fitted on.
        """
        guard = LatentGuard.read(folder)
        if backend is None:
            return guard
        if allow_mismatch:
            return guard.admit(backend)
        guard.check(backend)
        return guard

    def admit(self, backend: Backend) -> LatentGuard:
        """The guard itself on its own model, else bound to the model that it met (``rebind``)."""
        there = self.rebind(backend)
        shift = Shift.between(self, there)
        return there if shift.differences or shift.notable else self
