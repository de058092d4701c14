"""Run the suite: each set is scored once, and what is done stays done when a run is killed.

OUT/verdicts/SET.jsonl holds the verdicts, without texts; SET.json beside it says of which guard
and which prompts they are, and how long scoring took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from latentguard.benchmark.figures import Readings, SetFigures, measure, share
from latentguard.benchmark.suite import SUITE, LoadedSet, SuiteSet, load_set
from latentguard.data.builtin import load_guard_prompts, load_training_rows
from latentguard.data.surface_audit import ngram_scores
from latentguard.errors import PromptError
from latentguard.files import read_whole_lines, write_atomic
from latentguard.guard.cascade import Cascade
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import prompt_digest
from latentguard.guard.score_files import score_to_file
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, digest_prompts, no_progress
from latentguard.stats.estimate import Estimate

VERDICTS = "verdicts"
"""In the output folder."""

GUARD, PAPER, NGRAMS = "this guard", "the paper's rule", "n-grams"
"""Names of the rows."""

TIMED = 32
"""Prompts that are asked one at a time to measure latency."""

MIN_TRAINING = 20
"""Built-in training rows of each label that n-grams need; with fewer the default rows serve."""

Step = Callable[[str, int | None], Progress]
"""Begins a step of so many prompts; returns what is called as they are done."""


@dataclass(frozen=True)
class Latency:
    """How long the guard takes, on the machine of the run."""

    median: float
    """Milliseconds for a single prompt."""

    high: float
    """Their 95th percentile."""

    n: int
    """Prompts that were timed one at a time."""

    set: str
    """Which set they are of."""


@dataclass(frozen=True)
class Asked:
    """Of which prompts of a set a second opinion was asked."""

    harmful: Estimate | None
    """Share of the harmful prompts; None without any."""

    harmless: Estimate | None
    """Share of the harmless prompts; None without any."""

    failed: int
    """How often it gave no opinion; the guard does not flag these."""


@dataclass(frozen=True)
class SetResult:
    """One set of the suite, measured."""

    name: str
    """As in ``data list``."""

    title: str
    """As people call it."""

    note: str
    """How many prompts were read, and of how many."""

    figures: Mapping[str, SetFigures]
    """By row: this guard, the paper's rule, n-grams."""

    prompts_per_second: float
    """While the set was scored in batches; 0 if that is unknown."""

    asked: Asked | None = None
    """None without a second opinion."""


@dataclass(frozen=True)
class MissingSet:
    """One set of the suite that could not be measured."""

    title: str
    """As people call it."""

    reason: str
    """Why, and what to do."""


@dataclass(frozen=True)
class BenchmarkResult:
    """A guard on the suite."""

    sets: tuple[SetResult, ...]
    """Those that were there, in the order of the suite."""

    missing: tuple[MissingSet, ...]
    """The others."""

    latency: Latency | None
    """None where it was not measured."""

    meta: dict[str, Any] = field(default_factory=dict)
    """Guard, model, threshold, promise; what n-grams were fitted on."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def load_suite(
    folder: Path, only: Sequence[str] = (), *, limit: int | None = None
) -> tuple[list[LoadedSet], list[MissingSet]]:
    """The sets of a data folder, and those that it lacks or that cannot be read.

    Raises:
        PromptError: if there is no such folder, no set of a name in ``only``, or not one set.
    """
    if not folder.is_dir():
        raise PromptError(f"{folder} is no folder. {_advice(folder)}")
    names = [one.name for one in SUITE]
    if unknown := [name for name in only if name not in names]:
        raise PromptError(f"The suite has no set '{unknown[0]}'; expected {', '.join(names)}.")
    loaded = list[LoadedSet]()
    missing = list[MissingSet]()
    unreadable = list[str]()
    for one in SUITE:
        if only and one.name not in only:
            continue
        try:
            loaded_set = load_set(one, folder, limit=limit)
        except PromptError as error:
            unreadable.append(str(error))
            missing.append(MissingSet(one.title, str(error)))
            continue
        if loaded_set is None:
            missing.append(MissingSet(one.title, _reason(one, folder)))
        else:
            loaded.append(loaded_set)
    if not loaded:
        reason = " ".join(unreadable) or _advice(folder)
        raise PromptError(f"{folder} holds no set of the suite that can be read. {reason}")
    return loaded, missing


def run_benchmark(
    guard: LatentGuard | Cascade,
    backend: Backend,
    sets: Sequence[LoadedSet],
    out: Path,
    *,
    missing: Sequence[MissingSet] = (),
    step: Step | None = None,
) -> BenchmarkResult:
    """Score every set and measure; goes on where a killed run of the same guard stopped.

    Args:
        guard: The guard; with a second opinion, its decisions are those of both together.
        backend: The model of the guard.
        sets: Of the suite.
        out: Folder for the verdicts.
        missing: Sets that could not be loaded; they are named in the result.
        step: Called with the name and size of each step.
    """
    begin = step or (lambda name, total: no_progress)
    first = guard.guard if isinstance(guard, Cascade) else guard
    first = replace(first, early_exit=None)  # the paper's rule needs the beliefs of every prompt
    asked = replace(guard, guard=first) if isinstance(guard, Cascade) else first
    training, basis = ngram_training(first)
    results = []
    for one in sets:
        advance = begin(one.suite_set.title, len(one.prompts))
        verdicts, speed = score_set(asked, backend, one, out / VERDICTS, advance)
        result = _result(one, verdicts, training, speed)
        is_joint = isinstance(asked, Cascade)
        results.append(replace(result, asked=count_asked(one, verdicts)) if is_joint else result)
    latency = measure_latency(asked, backend, sets[0], out / VERDICTS)
    meta = {
        "guard": first.digest,
        "model": first.fingerprint.model,
        "threshold": first.threshold,
        "promise": first.promise,
        "second_opinion": asked.second.name if isinstance(asked, Cascade) else None,
        "n_grams_fitted_on": basis,
        "sets": {one.suite_set.name: digest_prompts(one.prompts) for one in sets},
    }
    return BenchmarkResult(tuple(results), tuple(missing), latency, meta)


def score_set(
    guard: LatentGuard | Cascade, backend: Backend, one: LoadedSet, folder: Path, advance: Progress
) -> tuple[list[Verdict], float]:
    """The verdicts on a set, out of the folder if they are there, and prompts per second."""
    verdicts = folder / f"{one.suite_set.name}.jsonl"
    note = folder / f"{one.suite_set.name}.json"
    key = {"guard": guard.digest, "prompts": digest_prompts(one.prompts)}
    noted = _read_note(note)
    if verdicts.exists() and all(noted.get(name) == value for name, value in key.items()):
        advance(len(one.prompts))
    else:
        start = time.perf_counter()
        rows_before = score_to_file(guard, backend, one.prompts, verdicts, progress=advance)
        seconds = time.perf_counter() - start
        noted = {**key, "scored": len(one.prompts) - rows_before, "seconds": round(seconds, 3)}
        write_atomic(note, json.dumps(noted) + "\n")
    lines = read_whole_lines(verdicts)
    seconds = float(noted["seconds"])
    speed = noted["scored"] / seconds if seconds > 0 else 0.0
    return [Verdict.from_dict(json.loads(line)) for line in lines], speed


def measure_latency(
    guard: LatentGuard | Cascade, backend: Backend, one: LoadedSet, folder: Path
) -> Latency:
    """Milliseconds of single prompts, evenly spaced over a set; measured once for each guard."""
    path = folder / "latency.json"
    noted = _read_note(path)
    if noted.get("guard") == guard.digest and "latency" in noted:
        return Latency(**noted["latency"])
    count = min(TIMED, len(one.prompts))
    sample = [one.prompts[n * len(one.prompts) // count] for n in range(count)]
    times = list(_times(guard, backend, [sample[0], *sample]))[1:]  # the first warms caches up
    high = float(np.quantile(times, 0.95))
    latency = Latency(float(np.median(times)), high, count, one.suite_set.title)
    write_atomic(path, json.dumps({"guard": guard.digest, "latency": asdict(latency)}) + "\n")
    return latency


def ngram_training(guard: LatentGuard) -> tuple[list[Prompt], str]:
    """What n-grams are fitted on: the built-in rows that the guard was fitted on, or the default.

    Returns:
        The rows, and a sentence on them.
    """
    training_digests = set(guard.training_digests.tolist())
    rows = [
        p
        for p in load_guard_prompts("train")
        if prompt_digest(guard.reading.prepare(p)) in training_digests
    ]
    counts = [sum(p.harmful is label for p in rows) for label in (True, False)]
    if min(counts) >= MIN_TRAINING:
        return rows, f"the {len(rows):,} built-in rows that the guard was fitted on"
    rows = load_training_rows()
    return rows, f"{len(rows):,} built-in rows, as the guard was fitted on rows of another source"


def _result(
    one: LoadedSet, verdicts: Sequence[Verdict], training: Sequence[Prompt], speed: float
) -> SetResult:
    harmful = np.array([bool(p.harmful) for p in one.prompts], dtype=bool)
    readings = {
        GUARD: guard_readings(verdicts),
        PAPER: _signed(np.array([verdict.beliefs["harmful"] for verdict in verdicts])),
        NGRAMS: _signed(ngram_scores(training, one.prompts)),
    }
    figures = {name: measure(harmful, own) for name, own in readings.items()}
    title = one.suite_set.title
    return SetResult(one.suite_set.name, title, one.note, figures, speed)


def count_asked(one: LoadedSet, verdicts: Sequence[Verdict]) -> Asked:
    """Of which prompts of a set a second opinion was asked."""
    harmful = np.array([bool(p.harmful) for p in one.prompts], dtype=bool)
    asked = np.array([verdict.second_opinion is not None for verdict in verdicts], dtype=bool)
    failed = sum(verdict.second_opinion == "failed" for verdict in verdicts)
    return Asked(share(asked[harmful]), share(asked[~harmful]), failed)


def guard_readings(verdicts: Iterable[Verdict]) -> Readings:
    """Scores, decisions and probabilities of verdicts."""
    rows = [(one.score, one.flagged, one.probability > 0.5) for one in verdicts]
    scores, flagged, probable = zip(*rows, strict=True)
    return Readings(np.array(scores), np.array(flagged), np.array(probable))


def _signed(scores: np.ndarray[Any, np.dtype[np.float64]]) -> Readings:
    """A rule that flags what scores over 0, where it holds both classes for as likely."""
    return Readings(scores, scores > 0, scores > 0)


def _times(
    guard: LatentGuard | Cascade, backend: Backend, prompts: Sequence[Prompt]
) -> Iterator[float]:
    for prompt in prompts:
        start = time.perf_counter()
        list(guard.scan(backend, [prompt], progress=no_progress))
        yield 1000 * (time.perf_counter() - start)


def _read_note(path: Path) -> dict[str, Any]:
    """What an earlier run noted; nothing if it cannot be read, so that the set is scored anew."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _reason(one: SuiteSet, folder: Path) -> str:
    public = one.public
    hub = public.hub
    gated = (
        " It is gated: its terms must be accepted on the Hub first." if hub and hub.is_gated else ""
    )
    return (
        f"{folder} holds no {public.name}.jsonl. Get it: latentguard data fetch --out {folder} "
        f"--only {public.name}.{gated} Published at {public.upstream}."
    )


def _advice(folder: Path) -> str:
    return (
        "Expected a folder with files of the suite, such as toxicchat.jsonl. Get them: "
        f"latentguard data fetch --out {folder}"
    )
