"""Chunk calibration: what is usual in harmless texts, and the threshold of long prompts and chats.

The probe is the guard's own, so no harm is learned here: harmless documents and chats of the
training split say how the greatest score grows with the number of chunks, and those of the
validation split set the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from latentguard.errors import GuardError
from latentguard.guard.chunk_texts import CALIBRATION_TEXTS, harmless_texts
from latentguard.guard.chunking import LONGER_THAN, Chunking, LengthNorm
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import require_unseen
from latentguard.guard.reading_plan import ScoredPlan, versions_of
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, digest_prompts
from latentguard.stats.bounds import require_enough_harmless, threshold_for_fpr

NORM_TEXTS = 24
"""Documents, and as many chats, that the norms are taken from."""


def fit_chunking(
    backend: Backend,
    guard: LatentGuard,
    *,
    longer_than: int = LONGER_THAN,
    max_fpr: float = 0.05,
    progress: Progress | None = None,
) -> LatentGuard:
    """A guard that also reads long prompts and chats, calibrated on built-in texts.

    Args:
        backend: The guard's model.
        guard: Whose probe scores the chunks.
        longer_than: Characters up to which a prompt without earlier turns is read whole.
        max_fpr: False-positive rate to keep on long harmless prompts and chats.
        progress: Called with the number of texts read.
    """
    texts = harmless_texts("train", NORM_TEXTS, longer_than)
    fitted = {"norms_sha256": digest_prompts(texts)}
    guard = replace(guard, chunking=Chunking(longer_than=longer_than, fitted=fitted))
    guard = _with_norms(backend, guard, texts, progress)
    held_out = harmless_texts("validation", CALIBRATION_TEXTS, longer_than)
    return calibrate_chunking(backend, guard, held_out, max_fpr=max_fpr, progress=progress)


def calibrate_chunking(
    backend: Backend,
    guard: LatentGuard,
    harmless: Iterable[Prompt],
    *,
    max_fpr: float = 0.01,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> LatentGuard:
    """A new guard that flags at most ``max_fpr`` of long harmless prompts and chats like these.

    Raises:
        GuardError: if the guard has no chunking, or there are too few prompts for the rate.
    """
    chunking = require_chunking(guard)
    prompts = list(harmless)
    require_enough_harmless(len(prompts), max_fpr, confidence)
    read = [replace(guard.reading.prepare(p), segment=None) for p in prompts]
    require_unseen(read, guard.all_training_digests)
    scores = [
        max(one.score for version in versions_of(scored, chunking) for one in version.evidence)
        for scored in _read_by_chunks(backend, guard, prompts, progress)
    ]
    bound = threshold_for_fpr(scores, max_fpr, confidence)
    fitted = {
        **(chunking.fitted or {}),
        "max_fpr": max_fpr,
        "confidence": confidence,
        "calibration_sha256": digest_prompts(prompts),
    }
    chunking = replace(chunking, threshold=bound.threshold, bound=bound, fitted=fitted)
    return replace(guard, chunking=chunking).with_canaries(backend)  # some of these may be long


def require_chunking(guard: LatentGuard) -> Chunking:
    """The guard's chunking.

    Raises:
        GuardError: if it has none.
    """
    if guard.chunking is None:
        raise GuardError("This guard reads no long prompts; fit it with 'latentguard fit --long'.")
    return guard.chunking


def _read_by_chunks(
    backend: Backend,
    guard: LatentGuard,
    prompts: Sequence[Prompt],
    progress: Progress | None,
) -> Iterator[ScoredPlan]:
    """Read every prompt by chunks, also one that is a little shorter than what is called long."""
    always = replace(guard, chunking=replace(require_chunking(guard), longer_than=0))
    for scored in always.score_prompts(backend, prompts):
        yield scored
        if progress is not None:
            progress(1)


def _with_norms(
    backend: Backend, guard: LatentGuard, texts: Sequence[Prompt], progress: Progress | None
) -> LatentGuard:
    """Norms that are those of harmless texts, at every size that these pass through."""
    plain = replace(guard, deobfuscate=False)
    greatest = list[tuple[float, int]]()
    whole = list[tuple[float, int]]()
    for scored in _read_by_chunks(backend, plain, texts, progress):
        own, *chunks = (score.score for score in scored.scores)
        count = len(chunks)
        whole.append((own, count))
        running = np.maximum.accumulate(chunks)
        sizes = [2**k for k in range(count.bit_length() - 1)]
        greatest += [(float(running[n - 1]), n) for n in [*sizes, count]]
    norms = [LengthNorm.fit(*zip(*rows, strict=True)) for rows in (greatest, whole)]
    chunking = replace(require_chunking(guard), chunk_norm=norms[0], whole_norm=norms[1])
    return replace(guard, chunking=chunking)
