"""``latentguard compare``: reports of several studies on one page.

A report is the folder that ``latentguard study`` wrote; of it ``report.json`` alone is read. Claims
and curves hold no prompt and no reply, so neither does the comparison.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentguard.errors import StudyError
from latentguard.report.charts import overlaid_lines
from latentguard.report.document import Cell, Figure, Report, Section, Series, Table
from latentguard.report.styles import is_control
from latentguard.study.claims_report import COLUMNS, TITLE, count_outcomes

LAYERS = "layer (blocks passed)"
"""Name of the axis of figures by layer, which models of other depths share as a share of depth."""

DEPTH = "depth (layer over number of blocks)"


@dataclass(frozen=True)
class ClaimRow:
    """What one report says of one claim."""

    number: int
    """From 1."""

    name: str
    """In a sentence."""

    verdict: str
    """As in the report."""

    rest: tuple[Cell, ...]
    """The columns of the table of verdicts from the deciding effect to the form control."""


@dataclass(frozen=True)
class Curves:
    """The curves of one figure of a report."""

    axes: tuple[str, str]
    """Names of the axes."""

    series: Mapping[str, Series]
    """By name, without n."""


@dataclass(frozen=True)
class StudyReport:
    """What a comparison needs of one report."""

    label: str
    """Model and protocol; unique among the reports that are compared."""

    depth: int
    """Number of blocks of the model."""

    claims: tuple[ClaimRow, ...]
    """In order."""

    curves: Mapping[str, Curves]
    """By title of the figure."""

    meta: Mapping[str, Any]
    """Provenance, as in the report."""


def read_reports(folders: Sequence[str | Path]) -> list[StudyReport]:
    """The reports in some folders, each under a label of its own.

    Raises:
        StudyError: if a folder holds no report of a study, or one of an earlier version.
    """
    return reports_of(folders, [read_record(Path(folder)) for folder in folders])


def reports_of(
    folders: Sequence[str | Path], records: Sequence[Mapping[str, Any]]
) -> list[StudyReport]:
    """Reports from their records: ``meta``, ``tables`` and ``curves`` of ``report.json``.

    Raises:
        StudyError: if two of them cannot be told apart.
    """
    names = [f"{one['meta']['name']}, {one['meta']['settings']['protocol']}" for one in records]
    again = {name for name, count in Counter(names).items() if count > 1}
    labels = [
        f"{name} ({Path(folder).name})" if name in again else name
        for name, folder in zip(names, folders, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise StudyError("The same report is named twice; name folders of different names.")
    return [_report(label, one) for label, one in zip(labels, records, strict=True)]


def compare(reports: Sequence[StudyReport]) -> Report:
    """One page over several reports."""
    sections = (
        Section("Claims by report", _summary(reports), (_verdicts(reports), _claims(reports))),
        Section("What is compared", "", (_about(reports), *_settings(reports))),
        Section(
            "Curves",
            "Each panel is one curve of the reports' figures; each line is one report. Bands and "
            "bars are 95 % intervals, as in the reports.",
            tuple(_figures(reports)),
        ),
    )
    models = list(dict.fromkeys(str(one.meta["name"]) for one in reports))
    meta = {one.label: dict(one.meta) for one in reports}
    return Report(f"{len(reports)} studies of {_listed(models)}", sections, meta)


def read_record(folder: Path) -> dict[str, Any]:
    """The ``report.json`` of a folder, checked.

    Raises:
        StudyError: if the folder holds no report of a study, or one of an earlier version.
    """
    path = folder / "report.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{folder} should be a folder that 'latentguard study' wrote; {path} cannot be read "
            f"({type(error).__name__})."
        ) from error
    tables = record.get("tables", []) if isinstance(record, dict) else []
    heads = [tuple(t["columns"])[: len(COLUMNS)] for t in tables if t["title"] == TITLE]
    if heads != [COLUMNS] or "curves" not in record or "depth" not in record["meta"]:
        raise StudyError(
            f"{folder} holds no report of a study by this version. Run 'latentguard study' again "
            "with the same --out: the model is asked nothing that is in its store."
        )
    return dict(record)


def _report(label: str, record: Mapping[str, Any]) -> StudyReport:
    (table,) = (one for one in record["tables"] if one["title"] == TITLE)
    verdict, last = COLUMNS.index("verdict"), len(COLUMNS) - 1
    claims = tuple(
        ClaimRow(row[0], row[1], row[verdict], tuple(row[verdict + 1 : last]))
        for row in table["rows"]
    )
    curves = {one["title"]: _curves(one) for one in record["curves"]}
    return StudyReport(label, record["meta"]["depth"], claims, curves, record["meta"])


def _curves(record: Mapping[str, Any]) -> Curves:
    series = [
        Series(
            re.sub(r"\s*\(n = \d+\)", "", one["name"]),
            tuple(one["places"]),
            *(tuple(_number(x) for x in one[name]) for name in ("value", "low", "high")),
        )
        for one in record["series"]
    ]
    return Curves((record["x"], record["y"]), {one.name: one for one in series})


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _summary(reports: Sequence[StudyReport]) -> str:
    """Two sentences: where the reports agree, and where they do not."""
    verdicts = _verdicts_by_claim(reports)
    alike = {n: of[0] for n, of in verdicts.items() if len(set(of)) == 1}
    differing = [str(n) for n in verdicts if n not in alike]
    opposed = [str(n) for n, of in verdicts.items() if {"replicated", "not replicated"} <= set(of)]
    every = "both" if len(reports) == 2 else f"all {len(reports)}"
    if not alike:
        first = f"No claim has the same verdict in {every} reports."
    else:
        counts = count_outcomes(alike).partition(", ")[2]
        first = (
            f"{len(alike)} of {len(verdicts)} claims have the same verdict in {every} reports: "
            f"{counts}"
        )
    if not differing:
        return f"{first} The reports differ in no verdict."
    verb = "is" if len(opposed) == 1 else "are"
    clash = _claims_named(opposed) if opposed else "none"
    return (
        f"{first} Verdicts differ on {_claims_named(differing)}; {clash} "
        f"{verb if opposed else 'is'} replicated in one report and not replicated in another."
    )


def _claims_named(numbers: Sequence[str]) -> str:
    return f"claim{'' if len(numbers) == 1 else 's'} {', '.join(numbers)}"


def _verdicts_by_claim(reports: Sequence[StudyReport]) -> dict[int, list[str]]:
    verdicts: dict[int, list[str]] = {}
    for report in reports:
        for row in report.claims:
            verdicts.setdefault(row.number, []).append(row.verdict)
    return verdicts


def _names(reports: Sequence[StudyReport]) -> dict[int, str]:
    return {row.number: row.name for report in reports for row in report.claims}


def _verdicts(reports: Sequence[StudyReport]) -> Table:
    verdicts, names = _verdicts_by_claim(reports), _names(reports)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (number, names[number], *of) for number, of in verdicts.items()
    )
    columns = ("", "claim", *(one.label for one in reports))
    return Table("Verdicts", columns, rows)


def _claims(reports: Sequence[StudyReport]) -> Table:
    names = _names(reports)
    rows: list[tuple[Cell, ...]] = []
    for number, name in names.items():
        for report in reports:
            for row in report.claims:
                if row.number == number:
                    rows.append((number, name, report.label, row.verdict, *row.rest))
    note = (
        "Of several effects of a claim, the one that decides. Intervals: 95 %. The form control is "
        "what prompts of equal form show; each report has every condition, and the rules."
    )
    middle = COLUMNS[COLUMNS.index("verdict") : -1]
    return Table("Claims by report", ("", "claim", "report", *middle), tuple(rows), note)


def _about(reports: Sequence[StudyReport]) -> Table:
    rows = tuple(
        (
            one.label,
            str(one.meta["model"]["weights"])[:12],
            one.depth,
            str(one.meta["template"]),
            str(one.meta["judge"]),
            ", ".join(f"{k} {v}" for k, v in one.meta["versions"].items()),
        )
        for one in reports
    )
    columns = ("report", "weights (SHA-256)", "blocks", "template", "judge", "versions")
    return Table("The reports", columns, rows)


def _settings(reports: Sequence[StudyReport]) -> Iterator[Table]:
    """In which settings and prompts the reports differ."""
    settings = [dict(one.meta["settings"]) for one in reports]
    for record, one in zip(settings, reports, strict=True):
        record |= {f"prompts: {name}": pool["n"] for name, pool in one.meta["pools"].items()}
    names = list(dict.fromkeys(name for record in settings for name in record))
    rows = [(name, *(str(record.get(name, "")) for record in settings)) for name in names]
    differing = tuple(row for row in rows if len(set(row[1:])) > 1)
    if differing:
        yield Table(
            "What was done differently", ("setting", *(one.label for one in reports)), differing
        )


def _figures(reports: Sequence[StudyReport]) -> Iterator[Figure]:
    """One figure for each that two reports have, with a panel for each curve that both have."""
    titles = dict.fromkeys(title for one in reports for title in one.curves)
    for title in titles:
        having = [one for one in reports if title in one.curves]
        x, y = having[0].curves[title].axes
        is_relative = x == LAYERS and len({one.depth for one in having}) > 1
        panels = _panels(having, title, is_relative=is_relative)
        if panels:
            yield overlaid_lines(
                panels,
                [one.label for one in reports],
                title=title,
                x=DEPTH if is_relative else x,
                y=y,
            )


def _panels(
    reports: Sequence[StudyReport], title: str, *, is_relative: bool
) -> dict[str, dict[str, Series]]:
    """Name of a curve -> report -> the curve; those of two reports at least."""
    names = dict.fromkeys(name for one in reports for name in one.curves[title].series)
    panels = {}
    for name in names:
        lines = {
            one.label: _placed(one.curves[title].series[name], one.depth if is_relative else None)
            for one in reports
            if name in one.curves[title].series
        }
        if len(lines) > 1 and not is_control(name):
            panels[name] = lines
    return panels


def _placed(series: Series, depth: int | None) -> Series:
    """The curve at shares of the depth, if one is given."""
    if depth is None:
        return series
    places = tuple(float(place) / depth for place in series.places)
    return Series(series.name, places, series.value, series.low, series.high)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
