"""Fitting windows: the probe, the norms, and the threshold of long prompts and chats.

The probe learns from the built-in contrast set: both members of a pair stand at the end of the same
lines, and the mean state over the last ``SIZE`` tokens is what it sees, as it will when it scores
stretches. Later text cannot change these states, so none is read. Lines without a request are
harmless, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from latentguard.contrast import Split, load_contrast
from latentguard.contrast.frames import document, filler, framed
from latentguard.errors import GuardError
from latentguard.guard import LatentGuard
from latentguard.metrics import threshold_for_fpr
from latentguard.prompts import Message, Prompt
from latentguard.readouts import fit_linear
from latentguard.states import Progress, digest_prompts
from latentguard.traces import Trace, Tracer
from latentguard.windows import OVER, SIZE, Norm, Windows, stretches

LINES = (0, 0, 1, 1, 2, 4)
"""How many lines may stand before a request in training."""

BAND = (0.3, 0.7)
"""Layers that the probe may read, as shares of the depth."""

NORMING, CALIBRATION = 16, 48
"""Documents, and as many chats, that the norms and the threshold are taken from."""


def fit_windows(
    backend: Tracer, guard: LatentGuard, *, max_fpr: float = 0.05, progress: Progress | None = None
) -> LatentGuard:
    """A guard that also reads long prompts and chats, fitted and calibrated on built-in texts.

    Args:
        backend: The guard's model.
        guard: Whose readout scores the ends of turns.
        max_fpr: False-positive rate to keep on long harmless prompts and chats.
        progress: Called with the number of texts read.

    Raises:
        GuardError: if the guard's reading changes the text (``sealed``).
    """
    if guard.reading.name == "sealed":
        raise GuardError(
            "The sealed reading changes the text, so it cannot score every turn in one pass: fit "
            "the guard with another reading, such as span."
        )
    texts = training_texts()
    low, high = (round(share * backend.depth) for share in BAND)
    layers = tuple(range(low, high + 1))
    states = _last_tokens(backend, texts, layers, progress)
    fit = fit_linear(
        states, [bool(p.harmful) for p in texts], [p.pair or p.id for p in texts], layers
    )
    fitted = {"texts": len(texts), "data_sha256": digest_prompts(texts), **fit.choices}
    guard = guard.with_part(Windows(fit.readout, fitted=fitted))
    guard = _normed(backend, guard, harmless_texts("train", NORMING, 8), progress)
    held_out = harmless_texts("validation", CALIBRATION, 4)
    return calibrate_windows(backend, guard, held_out, max_fpr=max_fpr, progress=progress)


def calibrate_windows(
    backend: Tracer,
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
    scores = [
        max(e.score for e in windows.find(trace, guard.scores(trace.states).tolist()))
        for trace in _traces(backend, guard, prompts, progress)
    ]
    bound = threshold_for_fpr(scores, max_fpr, confidence)
    fitted = {**(windows.fitted or {}), "calibration_sha256": digest_prompts(prompts)}
    return guard.with_part(replace(windows, threshold=bound.threshold, bound=bound, fitted=fitted))


def windows_of(guard: LatentGuard) -> Windows:
    """The guard's windows.

    Raises:
        GuardError: if it has none.
    """
    windows = guard.part(Windows)
    if windows is None:
        raise GuardError("This guard reads no long prompts; fit it with 'latentguard fit --long'.")
    return windows


def training_texts() -> list[Prompt]:
    """Requests of the training split after some lines, and lines alone; all labelled."""
    texts = []
    for request in (p for p in load_contrast("train") if p.pair):
        seed = f"train {request.pair}"
        lines = random.Random(seed).choice(LINES)
        whole = framed(request.text, before=lines, after=0, seed=seed)
        texts.append(replace(request, text=whole.text[: whole.stop]))
        if not request.harmful:
            seed = f"lines {request.pair}"
            text = filler(150, seed=seed)
            stop = random.Random(seed).randint(60, 150)
            texts.append(Prompt(text[:stop].rstrip(), id=seed, harmful=False, pair=request.pair))
    return texts


def harmless_texts(split: Split, count: int, longest: int) -> list[Prompt]:
    """So many documents with a harmless request in each, and as many chats of such requests.

    The longest has about ``longest`` times ``OVER`` tokens.
    """
    requests = [p.text for p in load_contrast(split) if not p.harmful]
    draw, texts = random.Random(f"{split} texts"), []
    for number in range(count):
        characters = round(longest ** draw.random() * 4 * OVER)  # a token is about four of them
        whole = document(draw.choice(requests), characters, seed=f"{split} {number}")
        texts.append(Prompt(whole.text, id=f"{split}-document-{number}", harmful=False))
        said = draw.sample(requests, draw.randint(2, 6))
        history = [
            message
            for turn, text in enumerate(said[:-1])
            for message in (
                Message("user", text),
                Message("assistant", filler(60, seed=f"{split} {number} {turn}")),
            )
        ]
        texts.append(Prompt(said[-1], f"{split}-chat-{number}", False, history=tuple(history)))
    return texts


def _last_tokens(
    backend: Tracer, texts: Sequence[Prompt], layers: tuple[int, ...], progress: Progress | None
) -> torch.Tensor:
    """The mean state over the last tokens of each text, float32 [n l d]."""
    positions = ("t_inst", *(f"inst-{back}" for back in range(1, SIZE)))
    batches = backend.capture(texts, positions=positions, layers=layers, progress=progress)
    return torch.cat([states.values.float().mean(1) for states in batches])


def _traces(
    backend: Tracer, guard: LatentGuard, prompts: Iterable[Prompt], progress: Progress | None
) -> Iterator[Trace]:
    for prompt in prompts:
        yield guard.trace(backend, prompt)
        if progress is not None:
            progress(1)


def _normed(
    backend: Tracer, guard: LatentGuard, texts: Sequence[Prompt], progress: Progress | None
) -> LatentGuard:
    """Windows whose norms are those of harmless texts, at every size that these pass through."""
    windows = windows_of(guard)
    seen: dict[str, list[tuple[float, float]]] = {"stretch": [], "turn": [], "end": []}
    for trace in _traces(backend, guard, texts, progress):
        own = guard.scores(trace.states).tolist()
        if len(trace.turns) > 1:
            seen["turn"] += [(max(own[:k]), k) for k in range(1, len(own) + 1)]
        else:
            seen["end"].append((own[0], 1))
        seen["stretch"] += _growth(windows, trace)
    stretch, turn, end = (Norm.fit(*zip(*rows, strict=True)) for rows in seen.values())
    return guard.with_part(replace(windows, stretch=stretch, turn=turn, end=end))


def _growth(windows: Windows, trace: Trace) -> Iterator[tuple[float, float]]:
    """The greatest stretch of the first ``over``, 2 ``over``, ... tokens and of all, with sizes."""
    means = [stretches(turn.scores, windows.size).numpy() for turn in trace.turns]
    tokens = sum(len(turn.scores) for turn in trace.turns)
    running, size = np.maximum.accumulate(np.concatenate(means)), windows.over
    while len(trace.turns) == 1 and size < tokens:
        yield float(running[size - windows.size]), size / windows.over
        size *= 2
    yield float(running[-1]), max(1.0, tokens / windows.over)
