"""Fitting windows: what is usual in harmless texts, and the threshold of long prompts and chats.

The probe is the guard's own, so nothing is learnt of harm here: harmless documents and chats of
the training split say how the greatest score grows with the number of pieces, and those of the
validation split set the threshold.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from latentguard.data.builtin import Split, load_traffic
from latentguard.data.documents import document, filler
from latentguard.errors import GuardError
from latentguard.guard.chunking import OVER, Norm, Piece, Windows
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import require_apart
from latentguard.guard.obfuscations import Obfuscations, beneath
from latentguard.prompts import Message, Prompt
from latentguard.states import Backend, Progress, digest_prompts
from latentguard.stats.bounds import threshold_for_fpr

NORMING, CALIBRATION = 24, 100
"""Documents, and as many chats, that the norms and the threshold are taken from."""

LONGEST = 3600
"""Characters of the longest document, about; at least twice those of the shortest."""


def fit_windows(
    backend: Backend,
    guard: LatentGuard,
    *,
    over: int = OVER,
    max_fpr: float = 0.05,
    progress: Progress | None = None,
) -> LatentGuard:
    """A guard that also reads long prompts and chats, calibrated on built-in texts.

    Args:
        backend: The guard's model.
        guard: Whose probe scores the pieces.
        over: Characters up to which a prompt without earlier turns is read as ever.
        max_fpr: False-positive rate to keep on long harmless prompts and chats.
        progress: Called with the number of texts read.
    """
    texts = harmless_texts("train", NORMING, over)
    guard = guard.with_part(Windows(over=over, fitted={"norms_sha256": digest_prompts(texts)}))
    guard = _normed(backend, guard, texts, progress)
    held_out = harmless_texts("validation", CALIBRATION, over)
    return calibrate_windows(backend, guard, held_out, max_fpr=max_fpr, progress=progress)


def calibrate_windows(
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
        GuardError: if the guard has no windows, or there are too few prompts for the rate.
    """
    windows, prompts = windows_of(guard), list(harmless)
    threshold_for_fpr(range(len(prompts)), max_fpr, confidence)  # too few? say so first
    require_apart([replace(guard.reading.prepare(p), segment=None) for p in prompts], guard.marks)
    wanted, scores = guard.part(Obfuscations) is not None, list[float]()
    for prompt in prompts:
        others = beneath(prompt, wanted)
        readings = [prompt, *(other for other, _ in others)]
        found = (windows.find(*_read(backend, guard, reading)) for reading in readings)
        scores.append(max(e.score for evidence in found for e in evidence))
        if progress is not None:
            progress(1)
    bound = threshold_for_fpr(scores, max_fpr, confidence)
    how = dict(max_fpr=max_fpr, confidence=confidence, calibration_sha256=digest_prompts(prompts))
    fitted = {**(windows.fitted or {}), **how}
    windows = replace(windows, threshold=bound.threshold, bound=bound, fitted=fitted)
    return guard.with_part(windows).with_canaries(backend)  # those that are long move with it


def windows_of(guard: LatentGuard) -> Windows:
    """The guard's windows.

    Raises:
        GuardError: if it has none.
    """
    windows = guard.part(Windows)
    if windows is None:
        raise GuardError("This guard reads no long prompts; fit it with 'latentguard fit --long'.")
    return windows


def harmless_texts(split: Split, count: int, shortest: int = OVER) -> list[Prompt]:
    """So many documents from ``shortest`` characters to about ``LONGEST``, and as many chats.

    Half of the documents are lines of one kind after the other with a request among them
    (``frames``), half are harmless prompts of all kinds as paragraphs.
    """
    said = [p.text for p in load_traffic(split) if not p.harmful]
    draw, texts = random.Random(f"{split} texts"), []
    times = max(LONGEST / shortest, 2)
    for number in range(count):
        size = round(shortest * times ** draw.random())
        seed = f"{split} {number}"
        text = document(draw.choice(said), size, seed=seed) if number % 2 else ""
        text = text or _paragraphs(said, size, draw)
        texts.append(Prompt(text, id=f"{split}-document-{number}", harmful=False))
        texts.append(_chat(draw.sample(said, draw.randint(2, 6)), f"{split}-chat-{number}"))
    return texts


def _paragraphs(said: Sequence[str], size: int, draw: random.Random) -> str:
    text = ""
    while len(text) < size:
        text += draw.choice(said) + draw.choice(("\n", "\n\n", " "))
    return text.strip()


def _chat(said: Sequence[str], name: str) -> Prompt:
    """A chat of such requests, with replies that say nothing in particular."""
    history = [
        message
        for turn, text in enumerate(said[:-1])
        for message in (
            Message("user", text),
            Message("assistant", filler(60, seed=f"{name} {turn}")),
        )
    ]
    return Prompt(said[-1], name, False, history=tuple(history))


def _read(backend: Backend, guard: LatentGuard, prompt: Prompt) -> tuple[list[Piece], list[float]]:
    """The pieces of a prompt and the guard's scores, that of the whole first."""
    pieces = windows_of(guard).pieces(prompt)
    return pieces, guard.read_pieces(backend, prompt, pieces)[1]


def _normed(
    backend: Backend, guard: LatentGuard, texts: Sequence[Prompt], progress: Progress | None
) -> LatentGuard:
    """Norms that are those of harmless texts, at every size that these pass through."""
    greatest, whole = list[tuple[float, int]](), list[tuple[float, int]]()
    for text in texts:
        pieces, scores = _read(backend, guard, text)
        whole.append((scores[0], len(pieces)))
        running = np.maximum.accumulate(scores[1:])
        sizes = [2**k for k in range(len(pieces).bit_length() - 1)]
        greatest += [(float(running[n - 1]), n) for n in [*sizes, len(pieces)]]
        if progress is not None:
            progress(1)
    piece, end = (Norm.fit(*zip(*rows, strict=True)) for rows in (greatest, whole))
    return guard.with_part(replace(windows_of(guard), piece=piece, whole=end))
