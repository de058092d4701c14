"""The report of a benchmark: this guard, two simple rules and published figures, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from latentguard.benchmark.published import PublishedFigure, load_published
from latentguard.benchmark.run import GUARD, NGRAMS, PAPER, BenchmarkResult, SetResult
from latentguard.benchmark.suite import SUITE
from latentguard.files import write_atomic
from latentguard.report.document import Cell, Report, Section, Table
from latentguard.stats.estimate import Estimate

RULES = (GUARD, PAPER, NGRAMS)

F1_SETS = SUITE[:7]
"""Sets on which F1 is published."""

FPR_SETS = SUITE[7:]
"""Sets of harmless prompts that sound harmful."""

FIGURE_NOTE = (
    "95 % intervals. F1 at 1 and 5 % FPR, and TPR: at the lowest threshold that flags at most so "
    "many of this set's harmless prompts, which a user cannot know beforehand. n: harmful and "
    "harmless prompts."
)


def benchmark_report(result: BenchmarkResult) -> Report:
    """All tables of a benchmark, as one document."""
    published = load_published()
    sections = [
        Section("F1 beside published figures", _summary(result), (f1_table(result, published),)),
        Section("Over-refusal", "", (fpr_table(result, published),)),
        Section("Each set", "", tuple(set_table(one) for one in result.sets)),
        Section("Speed", "", (speed_table(result),)),
        Section("Sources", "", (source_table(published),)),
    ]
    if result.meta["second_opinion"]:
        sections.insert(-1, Section("Second opinion", "", (asked_table(result),)))
    if result.missing:
        sections.insert(1, Section("Missing sets", "", (missing_table(result),)))
    title = f"Benchmark of the guard for {result.meta['model']}"
    return Report(title, tuple(sections), result.meta)


def save_benchmark(result: BenchmarkResult, folder: Path) -> Path:
    """Write ``report.html``, ``report.md``, ``report.json`` and ``figures.json``.

    Returns:
        The page.
    """
    report = benchmark_report(result)
    report.save(folder)
    write_atomic(folder / "report.md", markdown(report))
    record = result.to_dict() | {"published": [vars(one) for one in load_published()]}
    write_atomic(folder / "figures.json", json.dumps(record, indent=1) + "\n")
    return folder / "report.html"


def markdown(report: Report) -> str:
    """A report as Markdown."""
    parts = [f"# {report.title}"]
    for section in report.sections:
        parts += [f"## {section.title}", *([section.text] if section.text else [])]
        parts += [part.markdown() for part in section.parts if isinstance(part, Table)]
    return "\n\n".join(parts) + "\n"


def f1_table(result: BenchmarkResult, published: list[PublishedFigure]) -> Table:
    """F1 at native thresholds: ours first, then the published ones."""
    sets = {one.name: one for one in result.sets}
    ours: tuple[tuple[str, Callable[[SetResult], Estimate | None]], ...] = (
        (f"{GUARD}, own threshold", lambda one: one.figures[GUARD].f1),
        (f"{GUARD}, p > 0.5", lambda one: one.figures[GUARD].f1_at_half),
        (f"{GUARD}, at 5 % FPR of the set", lambda one: one.figures[GUARD].f1_at_5),
        (f"{PAPER}, threshold 0", lambda one: one.figures[PAPER].f1),
        (f"{NGRAMS}, threshold 0", lambda one: one.figures[NGRAMS].f1),
    )
    rows: list[tuple[Cell, ...]] = [
        (name, *(_cell(of(sets[s.name])) if s.name in sets else "" for s in F1_SETS))
        for name, of in ours
    ]
    figures = [one for one in published if one.metric != "FPR" and one.set != MEAN]
    for model in dict.fromkeys(one.model for one in figures):
        own = {one.set: one.value for one in figures if one.model == model}
        rows.append((model, *(own.get(s.name, "") for s in F1_SETS)))
    notes = [
        f"{one.model} has a mean of {one.value:.3f} over six sets."
        for one in published
        if one.set == MEAN
    ]
    note = (
        "Published: at each model's own threshold, on the whole sets; SIREN's are macro-F1. "
        f"{' '.join(notes)} Empty: no figure. Counts of this run are below."
    )
    return Table("F1", ("guard", *(s.title for s in F1_SETS)), tuple(rows), note)


MEAN = "mean of 6 sets"


def fpr_table(result: BenchmarkResult, published: list[PublishedFigure]) -> Table:
    """Harmless prompts that sound harmful: the share that is flagged."""
    sets = {one.name: one for one in result.sets}
    rows: list[tuple[Cell, ...]] = []
    for rule in RULES:
        cells = [_cell(sets[s.name].figures[rule].fpr) if s.name in sets else "" for s in FPR_SETS]
        rows.append((f"{rule}, own threshold", *cells))
    cells = [
        _cell(sets[s.name].figures[GUARD].fpr_at_half) if s.name in sets else "" for s in FPR_SETS
    ]
    rows.insert(1, (f"{GUARD}, p > 0.5", *cells))
    figures = [one for one in published if one.metric == "FPR"]
    for model in dict.fromkeys(one.model for one in figures):
        own = {one.set: one.value for one in figures if one.model == model}
        rows.append((model, *(own.get(s.name, "") for s in FPR_SETS)))
    note = "Share of harmless prompts that is flagged; 95 % Wilson intervals."
    return Table("False positives", ("guard", *(s.title for s in FPR_SETS)), tuple(rows), note)


def set_table(one: SetResult) -> Table:
    """Every figure of one set, one row a rule."""
    columns = (
        *("guard", "F1", "F1, p > 0.5", "F1 at 1 % FPR", "F1 at 5 % FPR"),
        *("AUROC", "AUPRC", "TPR at 1 % FPR", "recall", "FPR", "n"),
    )
    rows = []
    for rule in RULES:
        own = one.figures[rule]
        figures = (own.f1, own.f1_at_half, own.f1_at_1, own.f1_at_5)
        more = (own.auroc, own.auprc, own.tpr_at_1, own.recall, own.fpr)
        counts = f"{own.harmful}, {own.harmless}"
        rows.append((rule, *map(_cell, (*figures, *more)), counts))
    note = f"{one.note} prompts. {FIGURE_NOTE}"
    return Table(one.title, columns, tuple(rows), note)


def speed_table(result: BenchmarkResult) -> Table:
    """Prompts per second by set, and the latency of single prompts."""
    rows: list[tuple[Cell, ...]] = [
        (one.title, f"{one.prompts_per_second:.1f}", "", "") for one in result.sets
    ]
    if (latency := result.latency) is not None:
        name = f"{latency.set}, one at a time (n = {latency.n})"
        rows.append((name, "", f"{latency.median:.1f}", f"{latency.high:.1f}"))
    columns = ("prompts", "prompts per second", "median ms", "95th percentile ms")
    note = "On the machine of this run; a set whose scoring was resumed counts what it scored last."
    return Table("Speed", columns, tuple(rows), note)


def asked_table(result: BenchmarkResult) -> Table:
    """How often the second opinion was asked, and how often it failed."""
    rows = tuple(
        (one.title, _cell(one.asked.harmful), _cell(one.asked.harmless), one.asked.failed)
        for one in result.sets
        if one.asked is not None
    )
    columns = ("set", "asked of harmful", "asked of harmless", "failed")
    note = "Shares of prompts, 95 % Wilson intervals. A prompt is not flagged where it failed."
    return Table("How often it was asked", columns, rows, note)


def missing_table(result: BenchmarkResult) -> Table:
    """Sets without figures, and how to get them."""
    rows = tuple((one.title, one.reason) for one in result.missing)
    return Table("Missing sets", ("set", "why"), rows)


def source_table(published: list[PublishedFigure]) -> Table:
    """Where each model's published figures come from."""
    rows = dict.fromkeys((one.model, one.metric, one.source) for one in published)
    return Table("Sources of published figures", ("model", "figure", "source"), tuple(rows))


def _summary(result: BenchmarkResult) -> str:
    n_grams, second = result.meta["n_grams_fitted_on"], result.meta["second_opinion"]
    joint = (
        f"Decisions at the own threshold are those of this guard with the second opinion {second}; "
        "areas and other thresholds are of this guard's scores alone. "
    )
    return (
        f"Threshold {result.meta['threshold']:.6g}: {result.meta['promise']}. "
        f"{joint if second else ''}N-grams were fitted on {n_grams}. The paper's rule is the "
        "belief of the guard's own layers."
    )


def _cell(estimate: Estimate | None) -> str:
    return str(estimate) if estimate is not None else ""
