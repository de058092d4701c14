"""LatentGuard: a guard spec with its model: fitted, calibrated, asked, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from latentguard.errors import GuardError, ModelMismatch
from latentguard.guard.artifact import read_folder, write_folder
from latentguard.guard.categories import Categories
from latentguard.guard.compatibility import (
    Canary,
    Shift,
    canary_prompts,
    explain_mismatch,
    require_readable,
)
from latentguard.guard.display import guard_table
from latentguard.guard.hub import find_guard, upload_guard
from latentguard.guard.leakage import prompt_digest
from latentguard.guard.own_model import OwnModel
from latentguard.guard.probabilities import fit_platt
from latentguard.guard.quadrants import Quadrants
from latentguard.guard.query_fitting import fit_reading_queries
from latentguard.guard.reading_plan import Outcome, ScoredPlan, VariantScore, score_plans
from latentguard.guard.replies import ReplyVerdict
from latentguard.guard.signature import VerifyKey
from latentguard.guard.spec import GuardSpec
from latentguard.guard.thresholds import Rates
from latentguard.guard.verdict import Verdict
from latentguard.models.reply_reading import ReplyBackend, score_reply_tokens
from latentguard.probes import fitting
from latentguard.probes.capture_cache import CaptureCache
from latentguard.probes.probe import Kind, layers_of
from latentguard.probes.queries import AttendedFit
from latentguard.prompts import Prompt, PromptLike, Reply, Turn, as_prompts, is_one_prompt
from latentguard.states import (
    DEFAULT_READING,
    Backend,
    Fingerprint,
    Progress,
    Reading,
    Scoring,
    States,
    no_progress,
    progress_bar,
    show_numbers,
)

if TYPE_CHECKING:
    from latentguard.guard.adapting import Adapted


@dataclass(frozen=True, eq=False)
class LatentGuard(GuardSpec):
    """A guard for one model; immutable.

    Examples:
        >>> guard("How do I kill a Python process?")  # doctest: +ELLIPSIS
        Verdict(...)
        >>> [verdict.flagged for verdict in guard(["Hello.", "Good morning."])]
        [...]
    """

    own_model: OwnModel = field(default_factory=OwnModel, repr=False)
    """Its model, loaded when it is first needed."""

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
            reading: ``t_inst``, ``t_post``, ``post+k``, ``sealed``, ``span``, ``pooled``, or
                ``attended``, for which queries are fitted (``query_fitting``).
            probe: ``centroid`` (the paper) or ``linear``.
            progress: Called with the number of prompts captured; those that queries are fitted on
                are captured twice.
            cache: Keeps the states while they are captured, so that a killed fit goes on from them.

        Raises:
            GuardError: if a prompt has no label, a class is missing, or a state is not finite.
        """
        where = Reading.of(reading, backend.post)
        fitting.require_kind_for(where, probe)
        rows = fitting.require_labels(prompts)
        layers = layers_of(probe, backend.depth)
        attended = None
        if reading == "attended":
            where, attended = fit_reading_queries(backend, where, rows, layers, progress=progress)
        states = fitting.capture(
            backend, where, rows, layers=layers, progress=progress, cache=cache
        )
        return LatentGuard.from_states(backend, states, where, probe, attended=attended)

    @staticmethod
    def from_states(
        backend: Backend,
        states: States,
        reading: Reading,
        probe: Kind = "linear",
        *,
        attended: AttendedFit | None = None,
    ) -> LatentGuard:
        """Fit a guard on states that were captured already (``fitting.fit_probe``).

        Args:
            backend: The model.
            states: Labelled.
            reading: Where it reads.
            probe: ``centroid`` or ``linear``.
            attended: What the reading ``attended`` adds (``fit_reading_queries``); None for other
                readings.

        Raises:
            GuardError: as ``fit``, or if the reading is ``attended`` and ``attended`` is missing.
        """
        fit = fitting.fit_probe(states, reading, probe, backend.depth, attended=attended)
        axes = fitting.fit_axes(states, fit.probe.layers)
        labels = np.array([bool(p.harmful) for p in states.prompts])
        held_out = fit.held_out
        guard = LatentGuard(
            reading=reading,
            probe=fit.probe,
            axes=axes,
            fingerprint=backend.fingerprint,
            platt=fit_platt(held_out, labels),
            spread=float(held_out.std()),
            fitted=fitting.provenance(states, fit),
            training_digests=torch.tensor([prompt_digest(p) for p in states.prompts]),
            own_model=OwnModel(backend),
            deobfuscate=probe == "linear",  # the paper's rule reads what is served, only
            quadrants=Quadrants() if len(axes) > 1 else None,
            categories=Categories.fit(
                states.select(fit.probe.layers), reading.positions, held_out[~labels]
            ),
        )
        return guard.with_canaries(backend, [p.text for p in canary_prompts()])

    def with_canaries(self, backend: Backend, texts: Sequence[str] = ()) -> LatentGuard:
        """The same guard, these canaries or its own scored as it scores now."""
        texts = texts or [canary.text for canary in self.canaries]
        scores = [verdict.score for verdict in self.scan(backend, texts, progress=no_progress)]
        return replace(self, canaries=tuple(map(Canary, texts, scores)))

    def calibrate(
        self,
        backend: Backend,
        prompts: Iterable[PromptLike],
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
        used = self.calibration_prompts(as_prompts(prompts), rates)
        verdicts = list(self.scan(backend, used, progress=progress))
        return self.calibrate_from(used, verdicts, rates, column=segment_column)

    def adapt(self, prompts: Iterable[PromptLike], *, name: str, force: bool = False) -> Adapted:
        """Teach the guard a batch of labelled prompts: ``adapting.adapt``, with its own model.

        Examples:
            >>> guard.adapt(labelled, name="july").guard.save("mine")  # doctest: +SKIP
        """
        from latentguard.guard.adapting import adapt  # it makes guards of this class

        return adapt(self, self.model, as_prompts(prompts), name=name, force=force)

    # ---- asking: with its own model

    @property
    def model(self) -> Backend:
        """Its model: the one that it was fitted or loaded with, else loaded now and verified.

        Raises:
            ModelError: if it cannot be loaded; ``ModelMismatch`` if it is not the guard's own.
        """
        return self.own_model.get(self.fingerprint, self.verify_model)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a text is no list of texts
        self, prompts: str | Prompt | Sequence[Turn]
    ) -> Verdict: ...

    @overload
    def __call__(self, prompts: Iterable[PromptLike]) -> list[Verdict]: ...

    def __call__(self, prompts: PromptLike | Iterable[PromptLike]) -> Verdict | list[Verdict]:
        """The verdict on one prompt (a text, a prompt or a chat); a list of them gives a list."""
        if is_one_prompt(prompts):
            return next(self.scan(self.model, [prompts], progress=no_progress))
        return list(self.scan(self.model, prompts))  # type: ignore[arg-type]  # they are several

    def predict_proba(self, prompts: Iterable[PromptLike]) -> Float[NDArray[np.float64], "n 2"]:
        """The probabilities of harmless and harmful of each prompt, as scikit-learn has them.

        Examples:
            >>> guard.predict_proba(["Hello.", "How are you?"]).shape
            (2, 2)
        """
        harmful = np.array([verdict.probability for verdict in self.scan(self.model, prompts)])
        return np.stack([1 - harmful, harmful], axis=1)

    def predict(self, prompts: Iterable[PromptLike]) -> Bool[NDArray[np.bool_], "n"]:
        """Whether each prompt is flagged."""
        return np.array([verdict.flagged for verdict in self.scan(self.model, prompts)], dtype=bool)

    # ---- reading: plan, score, combine

    def scan(
        self,
        backend: Backend,
        prompts: Iterable[PromptLike],
        *,
        progress: Progress | None = None,
    ) -> Iterator[Verdict]:
        """Yield a verdict for each prompt, in order, in lazy batches.

        Args:
            backend: The guard's model.
            prompts: Texts, prompts or chats.
            progress: Called with 1 after each prompt; a bar is shown if there is none and a person
                is at an interactive prompt or in a notebook.

        Raises:
            ModelMismatch: if the model is not the one the guard was fitted on.
            GuardError: if a state is not finite (fail closed).

        Examples:
            >>> [verdict.id for verdict in guard.scan(model, ["Hello.", "How are you?"])]
            ['1', '2']
        """
        with progress_bar("scan", prompts, progress) as advance:
            for outcome in self.read(backend, prompts):
                advance(1)
                yield outcome.verdict

    def read(self, backend: Backend, prompts: Iterable[PromptLike]) -> Iterator[Outcome]:
        """As ``scan``, with what was measured on the version of each prompt that decided."""
        return map(self.combine, self.score_prompts(backend, prompts))

    def score_prompts(
        self, backend: Backend, prompts: Iterable[PromptLike]
    ) -> Iterator[ScoredPlan]:
        """Yield all scores of each prompt, in order: ``combine`` makes a verdict of them.

        Guards that differ in their thresholds alone can share them.
        """
        self.require_match(backend.fingerprint)
        return score_plans(as_prompts(prompts), self.plan, partial(self.score, backend))

    def score(self, backend: Backend, texts: Iterator[Prompt]) -> Iterator[VariantScore]:
        """Yield the score of each text of a plan, in order, in lazy batches."""
        if isinstance(backend, Scoring):
            yield from backend.scores(self, texts)
            return
        for states in self.capture(backend, texts):
            yield from self.measure(states)

    def capture(self, backend: Backend, texts: Iterator[Prompt]) -> Iterator[States]:
        """Yield the states that ``measure`` takes, of each text of a plan, in lazy batches.

        Guards that read the same can share them.
        """
        return backend.capture(
            texts,
            positions=self.positions,
            layers=self.probe.layers,
            queries=self.reading.queries,
            progress=no_progress,
        )

    def scan_replies(
        self, backend: ReplyBackend, replies: Iterable[Reply], *, progress: Progress | None = None
    ) -> Iterator[ReplyVerdict]:
        """Yield a verdict for each reply, in order, lazily; as ``scan``, if it judges replies."""
        self.require_match(backend.fingerprint)
        judge = self.require_reply_probe()
        where = judge.probe.layers, judge.probe.weight
        with progress_bar("scan", replies, progress) as advance:
            for reply, token_scores in score_reply_tokens(backend, replies, *where):
                advance(1)
                yield judge.verdict(reply.prompt.id, token_scores)

    # ---- the model that it is bound to

    def require_match(self, fingerprint: Fingerprint) -> None:
        """Raise ``ModelMismatch``, saying what differs, unless the model is the guard's own."""
        if reason := explain_mismatch(self.fingerprint, fingerprint):
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
            own_model=OwnModel(backend),
            bound=None,
            fitted={**(self.fitted or {}), "fitted_on": asdict(self.fingerprint)},
            chunking=self.chunking and self.chunking.without_promise(),
            thresholds=self.thresholds and self.thresholds.without_promise(),
            quadrants=self.quadrants and self.quadrants.without_promise(),
            replies=self.replies and self.replies.without_promise(),
        )
        return there.with_canaries(backend)

    def accept_model(self, backend: Backend) -> LatentGuard:
        """The guard itself on its own model, else bound to the model that it met (``rebind``)."""
        there = self.rebind(backend)
        shift = self.shift_to(there)
        return there if shift.differences or shift.is_notable else self

    def with_model(self, backend: Backend, allow_mismatch: bool = False) -> LatentGuard:
        """The guard with its model: verified (``verify_model``), or ``accept_model`` if allowed."""
        if allow_mismatch:
            return replace(self.accept_model(backend), own_model=OwnModel(backend))
        self.verify_model(backend)
        return replace(self, own_model=OwnModel(backend))

    # ---- on disk and on the Hub

    def save(self, folder: str | Path) -> None:
        """Write ``guard.json``, ``guard.safetensors`` and a model card."""
        write_folder(folder, *self.to_dict(), self.hub_card())

    @staticmethod
    def load(
        folder: str | Path,
        backend: Backend | None = None,
        *,
        allow_mismatch: bool = False,
        verify_key: VerifyKey | None = None,
    ) -> LatentGuard:
        """Read a guard; with a backend, also check that it is the guard's model (``verify_model``).

        Args:
            folder: What ``save`` wrote.
            backend: The model that it is to guard; None loads its own when it is first needed.
            allow_mismatch: Go on with another model, bound to it (``rebind``).
            verify_key: What the guard has to be signed with, if anything.

        Raises:
            GuardError: if the folder is not a whole guard of a known schema, or not signed.
            ModelMismatch: if the backend is not the model that the guard was fitted on.
        """
        record, tensors = read_folder(folder, verify_key)
        try:
            guard = LatentGuard.from_dict(record, tensors)
        except (LookupError, TypeError, ValueError, AttributeError, GuardError) as error:
            reason = error if isinstance(error, ValueError | GuardError) else repr(error)
            raise GuardError(
                f"{folder} holds a damaged guard ({reason}); restore it or fit it again."
            ) from None
        return guard if backend is None else guard.with_model(backend, allow_mismatch)

    @staticmethod
    def from_pretrained(
        source: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> LatentGuard:
        """Read a guard from a folder or from the Hugging Face Hub.

        Args:
            source: A folder that ``save`` wrote, a Hub id such as ``org/guard``, or ``default``.
            revision: A branch, tag or commit of the Hub's repository.
            token: For the Hub; the one that you are logged in with by default.

        Raises:
            GuardError: if there is no such guard, or it is damaged.

        Examples:
            >>> lg.LatentGuard.from_pretrained("org/guard")  # doctest: +SKIP
            LatentGuard('org/model', reading='pooled', ...)
        """
        return LatentGuard.load(find_guard(source, revision=revision, token=token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        license: str | None = None,
        token: str | None = None,
        notes: Sequence[str] = (),
    ) -> str:
        """Upload the guard to the Hugging Face Hub, and make the repository if there is none.

        Args:
            repo_id: Such as ``org/guard``.
            private: Whether a new repository is private; the Hub's default if None.
            license: Named in the model card, such as ``apache-2.0``.
            token: For the Hub; the one that you are logged in with by default.
            notes: Further paragraphs of the model card, in Markdown.

        Returns:
            Where the upload can be seen.

        Raises:
            GuardError: if the Hub does not take it; says why.

        Examples:
            >>> guard.push_to_hub("org/guard")  # doctest: +SKIP
            'https://huggingface.co/org/guard/commit/...'
        """
        with TemporaryDirectory() as folder:
            write_folder(folder, *self.to_dict(), self.hub_card(license=license, notes=notes))
            return upload_guard(folder, repo_id, private=private, token=token)

    def __repr__(self) -> str:
        words = [
            repr(self.fingerprint.model),
            f"reading={self.reading.name!r}",
            f"probe={self.probe.kind!r}",
            f"layers={show_numbers(self.probe.layers)}",
            f"threshold={self.threshold:.4g}" + ("" if self.bound else " (uncalibrated)"),
        ]
        if self.categories and self.categories.packs:
            words.append(f"packs={list(self.categories.packs)}")
        return f"LatentGuard({', '.join(words)})"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return guard_table(self)
