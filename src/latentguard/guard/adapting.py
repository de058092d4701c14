"""Adapting a guard: teaching it a batch of labels, and forgetting one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from latentguard.errors import GuardError
from latentguard.guard.adaptation import LabelBatch, Labels, Reference
from latentguard.guard.adaptation_report import AdaptationReport, measure_adaptation
from latentguard.guard.features import read_texts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import prompt_digest
from latentguard.guard.refit import base_of, refit, require_able, with_labels
from latentguard.probes.fitting import require_labels
from latentguard.prompts import Prompt
from latentguard.report.document import Table
from latentguard.states import Backend, Progress, digest_prompts

ALLOWED_LOSS = 0.03
"""AUROC on built-in prompts that a batch may cost without force."""

ALLOWED_RAISE = 0.1
"""Share of the built-in harmful prompts that it may cost by a higher threshold."""


@dataclass(frozen=True, eq=False)
class Adapted:
    """A guard that has learned, and what is known of the change."""

    guard: LatentGuard
    """An ordinary guard."""

    report: AdaptationReport
    """What was changed, and what it changes."""

    def tables(self) -> list[Table]:
        """Before and after; by category and segment; labels to look at again."""
        return self.report.tables()


def adapt(  # noqa: PLR0913 (each is asked for by itself)
    guard: LatentGuard,
    backend: Backend,
    prompts: Iterable[Prompt],
    *,
    name: str,
    date: str = "",
    max_fpr: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Adapted:
    """Teach a guard a batch of labels.

    Args:
        guard: Fitted and calibrated.
        backend: Its model.
        prompts: Labelled harmful or harmless.
        name: Of the batch; it can be forgotten by it.
        date: Noted with the batch.
        max_fpr: False-positive rate to keep; None for the guard's own.
        force: Take the batch though it costs more than ``ALLOWED_LOSS`` or ``ALLOWED_RAISE``.
        progress: Called with the number of prompts read.

    Raises:
        ModelMismatch: if the model is not the guard's own.
        GuardError: if a prompt has no label, the guard cannot learn, it has a batch of that name,
            or the batch costs too much of what it knew.
    """
    guard.require_match(backend.fingerprint)
    rows = require_batch(guard, prompts, name)
    base = base_of(guard)
    earlier = guard.adaptation
    reference = guard.reference or Reference.read(base, backend, progress)
    texts = read_texts(base, backend, rows, reference.feature_map, progress=progress)
    labels = Labels.of(texts, rows, name).sorted()
    batch = LabelBatch(
        name=name,
        date=date,
        harmful=int(labels.harmful.sum()),
        harmless=int((~labels.harmful).sum()),
        sha256=digest_prompts(labels.prompts),
    )
    batches = [*(earlier.batches if earlier else ()), batch]
    if max_fpr is None and earlier:
        max_fpr = earlier.max_fpr
    before = refit(base, reference, earlier.labels if earlier else None, max_fpr=max_fpr)
    every = earlier.labels.joined(labels) if earlier else labels
    after = refit(base, reference, every, max_fpr=max_fpr)
    report = _with_ids(measure_adaptation(before, after, reference, every, name), rows)
    if not force:
        _require_harmless_change(report, name)
    learned = with_labels(after, base, reference, every, batches, max_fpr, backend)
    return Adapted(learned, report)


def forget(guard: LatentGuard, backend: Backend, name: str) -> LatentGuard:
    """The guard that never saw a batch of labels.

    Raises:
        ModelMismatch: if the model is not the guard's own.
        GuardError: if it has learned no such batch.
    """
    guard.require_match(backend.fingerprint)
    earlier = guard.adaptation
    if earlier is None:
        raise GuardError("The guard has learned no labels, so there is nothing to forget.")
    earlier.require_batch(name)
    base = base_of(guard)
    batches = [batch for batch in earlier.batches if batch.name != name]
    reference = guard.reference
    assert reference is not None  # it is kept with what was learned
    if not batches:
        return replace(base, reference=reference)
    labels = earlier.labels.without(name)
    max_fpr = earlier.max_fpr
    return with_labels(
        refit(base, reference, labels, max_fpr=max_fpr),
        base,
        reference,
        labels,
        batches,
        max_fpr,
        backend,
    )


def require_batch(guard: LatentGuard, prompts: Iterable[Prompt], name: str) -> list[Prompt]:
    """The labelled prompts of a batch, each text with a label once.

    Raises:
        GuardError: if the guard cannot learn them.
    """
    require_able(guard)
    if not name.strip():
        raise GuardError("A batch of labels needs a name, by which it can be forgotten.")
    if guard.adaptation is not None:
        guard.adaptation.require_new(name)
    rows = require_labels(prompts)
    if not rows:
        raise GuardError("There are no labels to learn: expected at least one labelled prompt.")
    unique = {(prompt_digest(row), row.harmful): row for row in rows}
    return [unique[key] for key in sorted(unique)]  # read in the same batches whatever their order


def _require_harmless_change(report: AdaptationReport, name: str) -> None:
    """Raise a GuardError if a batch costs too much of what the guard knew."""
    advice = "Look at its labels for mistakes, or take it all the same with --force (force=True)."
    if report.forgotten > ALLOWED_LOSS:
        raise GuardError(
            f"With the batch '{name}' the guard would tell built-in prompts apart less well: its "
            f"AUROC falls by {report.forgotten:.3f}, allowed {ALLOWED_LOSS}. {advice}"
        )
    if report.raised > ALLOWED_RAISE:
        raise GuardError(
            f"The harmless labels of the batch '{name}' score so high that the threshold would "
            f"rise and {report.raised:.1%} less of the built-in harmful prompts would be caught, "
            f"allowed {ALLOWED_RAISE:.0%}. {advice}"
        )


def _with_ids(report: AdaptationReport, prompts: list[Prompt]) -> AdaptationReport:
    """The report with the ids of prompts in place of their digests."""
    ids = {str(prompt_digest(prompt)): prompt.id for prompt in prompts}
    suspects = [replace(one, id=ids[one.id]) for one in report.suspects]
    return replace(report, suspects=tuple(suspects))
