"""Category packs: 20 to 50 harmful examples become a category that can flag.

What is fitted and what is calibrated never overlap. Harmless prompts of the user's own, where they
are given, are halved: one half is what the examples are held against, so that the pack learns harm
and not the domain, the other half calibrates. A pack notes its half; texts that stand in it alone
never calibrate again (``learnt.apart``). Rows are halved, not texts: what occurs often in the
traffic does so in both halves. Without such prompts the built-in ones serve; but a promise that was
made on a user's own traffic is not silently exchanged for one on built-in prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from latentguard.data.builtin import load_contrast, load_traffic
from latentguard.errors import GuardError
from latentguard.guard.categories import FEWEST, Categories, Pack, fit_directions
from latentguard.guard.chunk_calibration import (
    CALIBRATION,
    calibrate_windows,
    harmless_texts,
    windows_of,
)
from latentguard.guard.chunking import Windows
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import NOTHING, Held, apart, mark
from latentguard.guard.score_scale import ScoreScale
from latentguard.guard.thresholds import Calibration
from latentguard.probes.fitting import slots
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, States, digest_prompts
from latentguard.stats.bounds import Bound, smallest_n

AGAINST = 200
"""Built-in harmless prompts that the examples of a pack are held against."""


def add(
    guard: LatentGuard,
    backend: Backend,
    name: str,
    examples: Sequence[Prompt],
    harmless: Sequence[Prompt] = (),
    *,
    progress: Progress | None = None,
) -> LatentGuard:
    """A new guard with one more category, calibrated for the rate that it promised before.

    Args:
        guard: Fitted on the backend's model.
        backend: The model.
        name: Of the category; a name of OpenAI's or of MLCommons' fills that category in the
            service.
        examples: Harmful prompts of the category, at least 10; 20 to 50 are usual.
        harmless: Prompts like the traffic to come, none of them harmful; built-in ones if empty.
        progress: Called with the number of prompts read.

    Raises:
        GuardError: if the guard has no categories or no promise, the name is taken or odd, the
            examples are too few, or the harmless prompts cannot carry the promise.
    """
    categories, rate = _categories(guard), _promise(guard)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_/-]*", name):
        raise GuardError(f"'{name}' is no name: expected small letters, digits, '_', '-', '/'.")
    if name in categories.packs:
        raise GuardError(f"The guard has a pack '{name}'; remove it first to fit it anew.")
    unique = list({p.text: replace(p, harmful=True) for p in examples}.values())
    if len(unique) < FEWEST:
        raise GuardError(
            f"A pack needs at least {FEWEST} different harmful examples, better 20 to 50; "
            f"found {len(unique)}."
        )
    like, calm = halves(harmless, guard.held) if harmless else ([], _built_in(guard))
    held, every = Held.of(like, calm), [*like, *calm]
    rest = apart(every, guard.held | held)[1]
    _require_enough(guard, rate, rest, "half of those given" if harmless else "the built-in ones")
    states = capture(guard, backend, [*unique, *against(), *like], progress)
    return recalibrated(with_pack(guard, name, states, held), backend, every, progress)


def remove(
    guard: LatentGuard,
    backend: Backend,
    name: str,
    harmless: Sequence[Prompt] = (),
    *,
    progress: Progress | None = None,
) -> LatentGuard:
    """A new guard without a pack, calibrated for the rate that it promised before.

    Raises:
        GuardError: if there is no such pack, or the harmless prompts cannot carry the promise.
    """
    categories, rate = _categories(guard), _promise(guard)
    if name not in categories.packs:
        known = ", ".join(categories.packs) or "none"
        raise GuardError(f"The guard has no pack '{name}'; it has: {known}.")
    calm, rest = list(harmless) or _built_in(guard), guard.with_part(categories.without(name))
    left = apart(calm, rest.held)[1]
    _require_enough(rest, rate, left, "those given" if harmless else "the built-in ones")
    return recalibrated(rest, backend, calm, progress)


def against() -> list[Prompt]:
    """The built-in harmless prompts that every pack is held against."""
    train = [p for p in load_traffic("train") if not p.harmful]
    return train[:: max(1, len(train) // AGAINST)][:AGAINST]


def halves(
    harmless: Sequence[Prompt],
    held: Held = NOTHING,
) -> tuple[list[Prompt], list[Prompt]]:
    """Which of the user's harmless prompts a pack is held against, and which calibrate.

    Args:
        harmless: The user's.
        held: What earlier packs are held against (``LatentGuard.held``); this one is, too.
    """
    calm = (replace(p, harmful=False) for p in harmless)
    known, rest = apart(calm, held)
    rest.sort(key=mark)
    random.Random(0).shuffle(rest)  # rows in no order of theirs: each half is like the traffic
    more = max(len(harmless) // 2 - len(known), 0)
    return [*known, *rest[:more]], rest[more:]


def capture(
    guard: LatentGuard,
    backend: Backend,
    prompts: Sequence[Prompt],
    progress: Progress | None = None,
) -> States:
    """The states of labelled prompts where the guard reads them."""
    ready = map(guard.reading.prepare, prompts)
    how = dict(positions=guard.reading.positions, layers=guard.probe.layers)
    return States.collect(backend.capture(ready, **how, progress=progress))  # type: ignore[arg-type]


def with_pack(
    guard: LatentGuard,
    name: str,
    states: States,
    held: Held = NOTHING,
) -> LatentGuard:
    """A new guard with a category fitted on labelled states; to be calibrated anew.

    Args:
        guard: The guard.
        name: Of the category.
        states: Of its examples and of harmless prompts.
        held: Marks of those of the latter that are the user's own.
    """
    categories, part = _categories(guard), states.select(guard.probe.layers)
    harmful = [bool(p.harmful) for p in part.prompts]
    groups = [p.text for p in part.prompts]
    fit = fit_directions(slots(part, categories.reads), {name: harmful}, groups)
    tail = ScoreScale.of(fit.held_out[[not h for h in harmful], 0])
    count = sum(harmful)
    made = (count, len(harmful) - count, digest_prompts(part.prompts))
    learnt = tuple(mark(p) for p in part.prompts if p.harmful)
    against, shared = sorted(held.alone), sorted(held.shared)
    pack = Pack(tail, *made, tuple(against), tuple(shared), learnt)
    return guard.with_part(categories.with_pack(pack, fit.directions))


def recalibrated(
    guard: LatentGuard,
    backend: Backend,
    calm: Sequence[Prompt],
    progress: Progress | None = None,
) -> LatentGuard:
    """A new guard: canaries scored anew, and thresholds for the rates that it promised before."""
    rate, long = _promise(guard), _long(guard, apart(calm, guard.held)[1])
    part = guard.part(Calibration)
    if part:  # how probabilities fitted was measured with other scores
        guard = guard.with_part(replace(part, knots=None, reliability=None))
    guard = guard.with_canaries(backend).calibrate(
        backend,
        calm,
        max_fpr=rate.max_fpr,
        review_fpr=part.common.review.max_fpr if part and part.common.review else None,
        confidence=rate.confidence,
        segment_column=part.column if part else None,
        progress=progress,
    )
    if not long:
        return guard
    max_fpr, sure = _kept_by_windows(guard)
    return calibrate_windows(
        backend, guard, long, max_fpr=max_fpr, confidence=sure, progress=progress
    )


def _long(guard: LatentGuard, calm: Sequence[Prompt]) -> Sequence[Prompt]:
    """What the threshold of the guard's windows is picked on again; nothing if there is none.

    Raises:
        GuardError: if it was picked on other prompts than built-in ones, and too few are given.
    """
    windows = guard.part(Windows)
    if windows is None or "calibration_sha256" not in (fitted := windows.fitted or {}):
        return []
    needed = smallest_n(*_kept_by_windows(guard))
    if len(given := [p for p in calm if guard.reads_pieces(p)]) >= needed:
        return given
    built_in = harmless_texts("validation", CALIBRATION, windows.over)
    if fitted["calibration_sha256"] == digest_prompts(built_in) and len(built_in) >= needed:
        return built_in
    raise GuardError(
        f"The threshold for long prompts and chats was set on others than this version's built-in "
        f"ones: it needs {needed} harmless ones like them to calibrate on; found {len(given)} that "
        "no pack is held against. Give more with --harmless."
    )


def _kept_by_windows(guard: LatentGuard) -> tuple[float, float]:
    """The rate that a guard's windows keep, and how surely; on another model, too."""
    fitted, bound = windows_of(guard).fitted or {}, _promise(guard)
    return fitted.get("max_fpr", bound.max_fpr), fitted.get("confidence", bound.confidence)


def _built_in(guard: LatentGuard) -> list[Prompt]:
    for built_in in (load_traffic, load_contrast):
        calm = _short(guard, [p for p in built_in("validation") if not p.harmful])
        if (guard.fitted or {}).get("calibration_sha256") == digest_prompts(calm):
            return calm
    raise GuardError(
        "This guard was calibrated on prompts other than the built-in ones, and their texts are "
        "not kept: give harmless prompts like them with --harmless, or its promise would silently "
        "become one about the built-in prompts."
    )


def _categories(guard: LatentGuard) -> Categories:
    categories = guard.part(Categories)
    if categories is None:
        raise GuardError(
            "This guard was fitted by an older version and knows no categories; fit it again."
        )
    return categories


def _promise(guard: LatentGuard) -> Bound:
    """The rate to keep; a guard that met another model has no bound, but knows what it promised."""
    calibration = guard.part(Calibration)
    bound = calibration.common.block if calibration else guard.bound
    if bound is None:
        raise GuardError(
            "This guard promises no false-positive rate that could be kept; run "
            "'latentguard calibrate' first."
        )
    return bound


def _require_enough(guard: LatentGuard, rate: Bound, calm: Sequence[Prompt], which: str) -> None:
    """Say so before the model reads any of them."""
    needed, found = smallest_n(rate.max_fpr, rate.confidence), len(_short(guard, calm))
    if found < needed:
        raise GuardError(
            f"A false-positive rate of {rate.max_fpr:.2%} with {100 * rate.confidence:g}% "
            f"confidence needs {needed} harmless prompts to calibrate on; found {found} "
            f"({which}). Give more with --harmless."
        )
    part = guard.part(Calibration)
    for name in part.segments if part else ():
        if (found := sum(p.segment == name for p in _short(guard, calm))) < needed:
            raise GuardError(
                f"The segment '{name}' has a threshold of its own, which needs {needed} harmless "
                f"prompts to calibrate on; found {found} ({which}). Give more with --harmless, "
                "with the segment of each in its column."
            )
    _long(guard, calm)


def _short(guard: LatentGuard, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Without those that the guard's windows read."""
    return [p for p in prompts if not guard.reads_pieces(p)]
