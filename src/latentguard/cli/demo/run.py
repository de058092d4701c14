"""``latentguard demo``: the whole job on a real model, ending in a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentguard.cli.demo.detection import (
    decision_table,
    detection_table,
    guard_scores,
    layer_curves,
    length_scores,
    random_direction_scores,
)
from latentguard.data.builtin import load_contrast, load_samples
from latentguard.data.surface_audit import SurfaceAudit, audit_surface, ngram_scores
from latentguard.errors import GuardError
from latentguard.guard.artifact import JSON_FILE
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.score_files import score_to_file
from latentguard.guard.verdict import Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.models.sources import DEFAULT_HUB_ID
from latentguard.probes.fitting import capture
from latentguard.prompts import Prompt
from latentguard.report import charts
from latentguard.report.document import Figure, Report, Section, Table
from latentguard.states import DEFAULT_READING, Progress, Reading, States, digest_prompts
from latentguard.stats.detection import auroc

MAX_FPR = 0.05
OURS, PAPER = "latent guard (this demo's)", "the paper's rule"

Step = Callable[[str, int], Progress]
"""Opens a step of so many prompts on the progress bar."""


def run(backend: ChatModel, guard_folder: Path, out: Path, *, step: Step) -> Path:
    """Fit (or reuse) the guards, calibrate, score the samples, write the report.

    Returns:
        The report's folder.

    Raises:
        ModelMismatch: if the guard that is there belongs to another model.
    """
    guard, paper = fitted_guards(backend, guard_folder, step)
    samples, test = load_samples(), load_contrast("test")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "samples.jsonl"
    score_to_file(guard, backend, samples, file, progress=step("score", len(samples)))
    verdicts = [Verdict.from_dict(json.loads(line)) for line in file.read_text().splitlines()]
    states = capture(
        backend,
        Reading.of(DEFAULT_READING, backend.post),
        test,
        progress=step("evaluate", len(test)),
    )
    report = Report(
        f"Latent guard for {name_of(backend)}",
        (
            summary_section(guard, name_of(backend)),
            sample_section(samples, verdicts, guard),
            *detection_sections(guard, paper, states),
            audit_section(audit_surface(load_contrast("train"))),
        ),
        provenance(guard),
    )
    return report.save(out)


def fitted_guards(backend: ChatModel, folder: Path, step: Step) -> tuple[LatentGuard, LatentGuard]:
    """The calibrated default guard and the paper's rule on the same prompts, fitted once."""
    paths = folder, folder / "paper"
    train = load_contrast("train")
    if all((path / JSON_FILE).exists() for path in paths):
        guards = [LatentGuard.load(path, backend) for path in paths]
        if _own(guards[0], train):
            return guards[0], guards[1]
    if (folder / JSON_FILE).exists():
        raise GuardError(
            f"{folder} holds a guard that the demo did not make, and would be overwritten; name "
            "another folder (--guard)."
        )
    reading = Reading.of(DEFAULT_READING, backend.post)
    states = capture(backend, reading, train, progress=step("capture", len(train)))
    ours = LatentGuard.from_states(backend, states, reading, "linear")
    t_inst = Reading.of("t_inst", backend.post)
    theirs = LatentGuard.from_states(backend, states, t_inst, "centroid")
    harmless = [p for p in load_contrast("validation") if not p.harmful]
    bar = step("calibrate", len(harmless))
    ours = ours.calibrate(backend, harmless, max_fpr=MAX_FPR, progress=bar)
    theirs.save(paths[1])
    ours.save(paths[0])
    return ours, theirs


def _own(guard: LatentGuard, train: Sequence[Prompt]) -> bool:
    """Whether it is the demo's: one that was fitted into its folder since is another."""
    fitted = guard.fitted or {}
    return (
        fitted.get("data_sha256") == digest_prompts(train)
        and (guard.reading.name, guard.probe.kind) == (DEFAULT_READING, "linear")
        and guard.bound is not None
        and guard.bound.max_fpr == MAX_FPR
    )


def name_of(backend: ChatModel) -> str:
    """The model's name for people."""
    default = f"{DEFAULT_HUB_ID}, 4-bit weights (default)"
    return default if backend.source == "default" else backend.source


def summary_section(guard: LatentGuard, model: str) -> Section:
    """What was made."""
    layers = guard.probe.layers
    text = (
        f"This guard reads the residual stream of {model} at "
        f"{', '.join(guard.reading.positions)} in layers {layers[0]} to {layers[-1]}, in the pass "
        f"that serves the request, and scores it with a {guard.probe.kind} probe. Its "
        f"threshold is {guard.threshold:.4g}: {guard.promise}. The promise holds for prompts like "
        "the built-in validation split, most of which sound harmful and are not; calibrate "
        "on your own traffic before you rely on it."
    )
    return Section("What this is", text)


def sample_section(
    samples: Sequence[Prompt], verdicts: Sequence[Verdict], guard: LatentGuard
) -> Section:
    """The verdict on each sample prompt."""
    colours = [charts.HARMFUL if v.flagged else charts.HARMLESS for v in verdicts]
    figure = charts.bar_chart(
        [p.text for p in samples],
        [v.probability for v in verdicts],
        title="Probability of harmful",
        x="probability",
        caption=f"{len(samples)} prompts outside the training data; orange is flagged.",
        colours=colours,
    )
    rows = tuple(
        (p.id, p.text, v.score, v.probability, v.flagged, v.beliefs["harmful"])
        for p, v in zip(samples, verdicts, strict=True)
    )
    columns = ("id", "prompt", "score", "probability", "flagged", "Delta_harmful")
    note = f"Flagged: score above {guard.threshold:.4g}. Delta_harmful is equation 3 of the paper."
    return Section("Sample prompts", "", (figure, Table("Verdicts", columns, rows, note)))


def detection_sections(
    guard: LatentGuard, paper: LatentGuard, states: States
) -> tuple[Section, Section]:
    """Quality on the test split, beside the baselines; and by category and layer."""
    test = list(states.prompts)
    labels = np.array([bool(p.harmful) for p in test])
    ours, theirs = guard_scores(guard, states), guard_scores(paper, states)
    words = ngram_scores(load_contrast("train"), test)
    scores = {OURS: ours, PAPER: theirs, "n-grams": words, "length": length_scores(test)}
    draws = random_direction_scores(guard, states)
    chance = float(np.mean([max(a := auroc(labels, s), 1 - a) for s in draws]))
    decisions = {OURS: (ours, guard.threshold), PAPER: (theirs, paper.threshold)}
    text = (
        "The test split of the built-in contrast set: prompts that no guard here was fitted or "
        f"calibrated on. A random direction of equal norm reaches an AUROC of {chance:.3f} "
        f"(mean of {len(draws)} draws, each with its better sign)."
    )
    detection = Section(
        "Detection",
        text,
        (
            detection_table(scores, test, "the test split"),
            decision_table(decisions, test, "the test split"),
            charts.score_histogram(ours, labels, guard.threshold, of="the test split"),
            charts.roc_curves({k: scores[k] for k in (OURS, PAPER, "n-grams")}, labels, of="test"),
        ),
    )
    parts = (category_figure(test, ours, guard.threshold), layer_figure(paper, states, labels))
    return detection, Section("Where it comes from", "", parts)


def category_figure(
    test: Sequence[Prompt], scores: NDArray[np.float64], threshold: float
) -> Figure:
    """Share flagged by category: of harmful prompts, and of the two harmless kinds."""
    kinds = sorted({(not p.harmful, str(p.category)) for p in test})
    names, values, colours = [], [], []
    for harmless, category in kinds:
        rows = [(p.category, not p.harmful) == (category, harmless) for p in test]
        side = "harmless" if harmless else "harmful"
        names.append(f"{side}: {category.replace('_', ' ')} (n={sum(rows)})")
        values.append(float((scores[rows] > threshold).mean()))
        colours.append(charts.HARMLESS if harmless else charts.HARMFUL)
    return charts.bar_chart(
        names,
        values,
        title="Share flagged by category",
        x="share flagged",
        caption="Orange bars should be long, green bars short. n is small: read 20 % as noise.",
        colours=colours,
    )


def layer_figure(paper: LatentGuard, states: States, labels: NDArray[np.bool_]) -> Figure:
    """AUROC of s^l (equation 2) at t_inst, layer by layer."""
    axis = paper.axes[0]
    curve = layer_curves(axis, states.select(axis.layers), labels)
    return charts.lines_by_layer(
        {"s^l at t_inst": curve},
        axis.layers,
        title="What each layer knows at t_inst",
        y="AUROC",
        caption="AUROC of s^l, equation 2 of the paper, with 95 % bootstrap bands; 0.5 is chance.",
    )


def audit_section(audit: SurfaceAudit) -> Section:
    """How well form alone would do."""
    rows = tuple(
        (name, float(getattr(audit, name))) for name in ("ending", "form", "length", "ngrams")
    )
    note = (
        "Balanced accuracy of the last character's class and of the form, AUROC of the length, and "
        "of n-grams over pair-disjoint folds; 0.5 is nothing."
    )
    table = Table("Surface audit of the training split", ("feature", "separates"), rows, note)
    text = "A probe learns whatever separates its training classes, so form must not."
    return Section("Form", text, (table,))


def provenance(guard: LatentGuard) -> dict[str, object]:
    """What a reader needs to make the report again."""
    bound = asdict(guard.bound) if guard.bound else None
    return {
        "guard": guard.digest,
        "fingerprint": asdict(guard.fingerprint),
        "fitted": guard.fitted,
        "bound": bound,
    }
