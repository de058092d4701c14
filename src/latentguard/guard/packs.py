"""Category packs: 20 to 50 harmful examples become a category that can flag.

What is fitted and what is calibrated never overlap.

- Harmless prompts of the user's own, where they are given, are halved. One half is what the
  examples are trained against, so that the pack learns harm and not the domain. The other half
  calibrates. Rows are halved, not texts: what occurs often in the traffic does so in both halves.
- A pack keeps the digests of its half; texts that stand in it alone never calibrate again
  (``leakage.exclude_training_prompts``).
- Without such prompts the built-in ones serve. But a promise that was made on a user's own traffic
  is not silently exchanged for one on built-in prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from latentguard.data.builtin import load_contrast, load_guard_prompts
from latentguard.errors import GuardError
from latentguard.guard.categories import MIN_PROMPTS, Categories, Pack, fit_directions
from latentguard.guard.chunk_calibration import calibrate_chunking, require_chunking
from latentguard.guard.chunk_texts import CALIBRATION_TEXTS, harmless_texts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import TrainingPrompts, exclude_training_prompts, prompt_digest
from latentguard.guard.score_scale import ScoreScale
from latentguard.probes.fitting import slots
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, States, digest_prompts
from latentguard.stats.bounds import Bound, smallest_n

BUILT_IN_HARMLESS = 200
"""Built-in harmless prompts that the examples of a pack are trained against."""


@dataclass(frozen=True)
class PackPlan:
    """What a pack is made of, checked before any model is needed."""

    examples: tuple[Prompt, ...]
    """Harmful prompts of the category, each text once."""

    training: tuple[Prompt, ...]
    """The user's harmless prompts that the examples are trained against."""

    calibration: tuple[Prompt, ...]
    """Harmless prompts that calibrate."""


def plan_pack(
    guard: LatentGuard, name: str, examples: Sequence[Prompt], harmless: Sequence[Prompt] = ()
) -> PackPlan:
    """Say what ``add`` would train and calibrate a pack on.

    Raises:
        GuardError: as ``add``.
    """
    categories = _require_categories(guard)
    rate = _require_promise(guard)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_/-]*", name):
        raise GuardError(f"'{name}' is no name: expected small letters, digits, '_', '-', '/'.")
    if name in categories.packs:
        raise GuardError(f"The guard has a pack '{name}'; remove it first to fit it anew.")
    unique = list({p.text: replace(p, harmful=True) for p in examples}.values())
    if len(unique) < MIN_PROMPTS:
        raise GuardError(
            f"A pack needs at least {MIN_PROMPTS} different harmful examples, better 20 to 50; "
            f"found {len(unique)}."
        )
    training = list[Prompt]()
    if harmless:
        training, calibration = halve(harmless, guard.pack_training_prompts)
    else:
        calibration = _built_in(guard)
    own = TrainingPrompts.of(training, calibration)
    _, allowed = exclude_training_prompts(
        [*training, *calibration], guard.pack_training_prompts | own
    )
    which = "half of those given" if harmless else "the built-in ones"
    _require_enough(guard, rate, allowed, which)
    return PackPlan(tuple(unique), tuple(training), tuple(calibration))


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
    plan = plan_pack(guard, name, examples, harmless)
    trained_on = [*plan.examples, *built_in_harmless(), *plan.training]
    states = capture(guard, backend, trained_on, progress)
    own = TrainingPrompts.of(plan.training, plan.calibration)
    with_it = with_pack(guard, name, states, own)
    return recalibrate(with_it, backend, [*plan.training, *plan.calibration], progress)


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
    prompts = list(harmless) or _built_in(guard)
    return recalibrate(without_pack(guard, name, harmless), backend, prompts, progress)


def without_pack(guard: LatentGuard, name: str, harmless: Sequence[Prompt] = ()) -> LatentGuard:
    """The guard without a pack, its thresholds as they were: to be calibrated anew.

    Raises:
        GuardError: as ``remove``.
    """
    categories = _require_categories(guard)
    rate = _require_promise(guard)
    if name not in categories.packs:
        names = ", ".join(categories.packs) or "none"
        raise GuardError(f"The guard has no pack '{name}'; it has: {names}.")
    prompts = list(harmless) or _built_in(guard)
    without = replace(guard, categories=categories.without_pack(name))
    _, allowed = exclude_training_prompts(prompts, without.pack_training_prompts)
    which = "those given" if harmless else "the built-in ones"
    _require_enough(without, rate, allowed, which)
    return without


def built_in_harmless() -> list[Prompt]:
    """The built-in harmless prompts that every pack is trained against."""
    train = [p for p in load_guard_prompts("train") if not p.harmful]
    return train[:: max(1, len(train) // BUILT_IN_HARMLESS)][:BUILT_IN_HARMLESS]


def halve(
    harmless: Sequence[Prompt], before: TrainingPrompts | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Which of the user's harmless prompts a pack is trained against, and which calibrate.

    Args:
        harmless: The user's.
        before: What earlier packs were trained against; this one is, too.
    """
    labelled = (replace(p, harmful=False) for p in harmless)
    training, rest = exclude_training_prompts(labelled, before or TrainingPrompts())
    rest.sort(key=prompt_digest)
    random.Random(0).shuffle(rest)  # rows in no order of theirs: each half is like the traffic
    more = max(len(harmless) // 2 - len(training), 0)
    return [*training, *rest[:more]], rest[more:]


def capture(
    guard: LatentGuard,
    backend: Backend,
    prompts: Sequence[Prompt],
    progress: Progress | None = None,
) -> States:
    """The states of labelled prompts where the guard reads them."""
    batches = backend.capture(
        map(guard.reading.prepare, prompts),
        positions=guard.reading.positions,
        layers=guard.probe.layers,
        queries=guard.reading.queries,
        progress=progress,
    )
    return States.collect(batches)


def with_pack(
    guard: LatentGuard, name: str, states: States, own: TrainingPrompts | None = None
) -> LatentGuard:
    """A new guard with a category fitted on labelled states; to be calibrated anew.

    Args:
        guard: The guard.
        name: Of the category.
        states: Of its examples and of harmless prompts.
        own: Those of the latter that are the user's own.
    """
    own = own or TrainingPrompts()
    categories = _require_categories(guard)
    states = states.select(guard.probe.layers)
    harmful = [bool(p.harmful) for p in states.prompts]
    groups = [p.text for p in states.prompts]
    fit = fit_directions(slots(states, categories.positions), {name: harmful}, groups)
    pack = Pack(
        scale=ScoreScale.of(fit.held_out[[not h for h in harmful], 0]),
        examples=sum(harmful),
        harmless=len(harmful) - sum(harmful),
        data_sha256=digest_prompts(states.prompts),
        harmless_alone=tuple(sorted(own.alone)),
        harmless_shared=tuple(sorted(own.shared)),
        harmful_digests=tuple(prompt_digest(p) for p in states.prompts if p.harmful),
    )
    return replace(guard, categories=categories.with_pack(pack, fit.directions))


def recalibrate(
    guard: LatentGuard,
    backend: Backend,
    harmless: Sequence[Prompt],
    progress: Progress | None = None,
) -> LatentGuard:
    """A new guard: canaries scored anew, and thresholds for the rates that it promised before."""
    rate = _require_promise(guard)
    long = _long_prompts(guard, exclude_training_prompts(harmless, guard.pack_training_prompts)[1])
    before = guard.thresholds
    if before:  # how probabilities fitted was measured with other scores
        guard = replace(guard, thresholds=replace(before, isotonic=None, reliability=None))
    guard = guard.with_canaries(backend).calibrate(
        backend,
        harmless,
        max_fpr=rate.max_fpr,
        review_fpr=before.common.review.max_fpr if before and before.common.review else None,
        confidence=rate.confidence,
        segment_column=before.column if before else None,
        progress=progress,
    )
    if not long:
        return guard
    max_fpr, confidence = _chunking_rate(guard)
    return calibrate_chunking(
        backend, guard, long, max_fpr=max_fpr, confidence=confidence, progress=progress
    )


def _long_prompts(guard: LatentGuard, harmless: Sequence[Prompt]) -> Sequence[Prompt]:
    """What the threshold of the guard's chunking is picked on again; nothing if there is none.

    Raises:
        GuardError: if it was picked on other prompts than built-in ones, and too few are given.
    """
    fitted = (guard.chunking and guard.chunking.fitted) or {}
    if guard.chunking is None or "calibration_sha256" not in fitted:
        return []
    minimum = smallest_n(*_chunking_rate(guard))
    long_prompts = [p for p in harmless if guard.is_chunked(p)]
    if len(long_prompts) >= minimum:
        return long_prompts
    built_in = harmless_texts("validation", CALIBRATION_TEXTS, guard.chunking.longer_than)
    if fitted["calibration_sha256"] == digest_prompts(built_in) and len(built_in) >= minimum:
        return built_in
    raise GuardError(
        f"The threshold for long prompts and chats was set on others than this version's built-in "
        f"ones: it needs {minimum} harmless ones like them to calibrate on; found "
        f"{len(long_prompts)} that no pack was trained on. Give more with --harmless."
    )


def _chunking_rate(guard: LatentGuard) -> tuple[float, float]:
    """The rate that a guard's chunking keeps, and its confidence; on another model, too."""
    fitted = require_chunking(guard).fitted or {}
    bound = _require_promise(guard)
    return fitted.get("max_fpr", bound.max_fpr), fitted.get("confidence", bound.confidence)


def _built_in(guard: LatentGuard) -> list[Prompt]:
    point = guard.thresholds.point if guard.thresholds else None
    if point is not None and point.traffic is not None:
        raise GuardError(
            "The threshold of this guard was moved to unlabelled traffic, whose texts are not "
            "kept: give harmless prompts like that traffic with --harmless, or the threshold "
            "would silently become one for the built-in prompts."
        )
    for load in (load_guard_prompts, load_contrast):
        harmless = _short_prompts(guard, [p for p in load("validation") if not p.harmful])
        if (guard.fitted or {}).get("calibration_sha256") == digest_prompts(harmless):
            return harmless
    raise GuardError(
        "This guard was calibrated on prompts other than the built-in ones, and their texts are "
        "not kept: give harmless prompts like them with --harmless, or its promise would silently "
        "become one about the built-in prompts."
    )


def _require_categories(guard: LatentGuard) -> Categories:
    if guard.categories is None:
        raise GuardError("This guard has no categories to add a pack to; fit it again.")
    return guard.categories


def _require_promise(guard: LatentGuard) -> Bound:
    """The rate to keep; a guard that met another model has no bound, but knows what it promised."""
    bound = guard.thresholds.common.block if guard.thresholds else guard.bound
    if bound is None:
        raise GuardError(
            "This guard promises no false-positive rate that could be kept; run "
            "'latentguard calibrate' first."
        )
    return bound


def _require_enough(
    guard: LatentGuard, rate: Bound, harmless: Sequence[Prompt], which: str
) -> None:
    """Say so before the model reads any of them."""
    minimum = smallest_n(rate.max_fpr, rate.confidence)
    short = _short_prompts(guard, harmless)
    if len(short) < minimum:
        raise GuardError(
            f"A false-positive rate of {rate.max_fpr:.2%} with {100 * rate.confidence:g}% "
            f"confidence needs {minimum} harmless prompts to calibrate on; found {len(short)} "
            f"({which}). Give more with --harmless."
        )
    for segment in guard.thresholds.segments if guard.thresholds else ():
        count = sum(p.segment == segment for p in short)
        if count < minimum:
            raise GuardError(
                f"The segment '{segment}' has a threshold of its own, which needs {minimum} "
                f"harmless prompts to calibrate on; found {count} ({which}). Give more with "
                "--harmless, with the segment of each in its column."
            )
    _long_prompts(guard, harmless)


def _short_prompts(guard: LatentGuard, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Without those that the guard reads by chunks."""
    return [p for p in prompts if not guard.is_chunked(p)]
