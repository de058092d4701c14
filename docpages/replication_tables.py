"""Tables of the replication page: each claim under each model and protocol, from the gallery."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from docpages.markdown_table import ROOT, markdown_table
from latentguard.report.page_table import format_interval

GALLERY = ROOT / "docs" / "gallery"

COMMAND = "python benchmarks/gallery.py REPORT... --out docs/gallery --data-dir DATA"

Row = Mapping[str, str]
"""A claim of a report, as ``claims.csv`` has it."""


def replication_table() -> str:
    """Claim by study: the verdict, and the effect that decides with its interval and n."""
    folders = _studies()
    claims = [_claims(folder) for folder in folders]
    head = [
        "claim",
        *(f"[{_name(folder)}](../gallery/{folder.name}/index.md)" for folder in folders),
    ]
    rows = [
        (f"{rows[0]['']}. {rows[0]['claim']}", *map(_cell, rows))
        for rows in zip(*claims, strict=True)
    ]
    return markdown_table(head, rows, COMMAND)


def effects_table() -> str:
    """What decides each claim that was measured, and what form shows, a row a study."""
    head = ["claim", "study", "what decides", "effect", "n", "n that would tell"]
    head += ["form control", "form shows"]
    rows = []
    for folder in _studies():
        for row in _claims(folder):
            if row["value"]:
                form = _interval(row, "form ") if row["form value"] else ""
                control = row["form control"] if form else ""
                effect = (row["effect that decides"], _interval(row, ""))
                decides = (*effect, row["n"], row["n that would tell"])
                rows.append((row[""], _name(folder), *decides, control, form))
    return markdown_table(head, sorted(rows, key=lambda row: int(row[0])), COMMAND)


def _studies() -> list[Path]:
    """The folders of the reports, in the order of the gallery's first page."""
    return sorted(path.parent for path in GALLERY.glob("*/claims.csv"))


def _claims(folder: Path) -> Sequence[Row]:
    with (folder / "claims.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _name(folder: Path) -> str:
    """Model and protocol, as people read them."""
    meta = json.loads((folder / "provenance.json").read_text("utf-8"))
    return f"{meta['name'].removesuffix('-Instruct')}, {meta['settings']['protocol']}"


def _cell(row: Row) -> str:
    measured = f"{_interval(row, '')}<br>n = {row['n']}" if row["value"] else "not measured"
    return f"**{row['verdict']}**<br>{measured}"


def _interval(row: Row, which: str) -> str:
    return format_interval(*(float(row[f"{which}{end}"]) for end in ("value", "low", "high")))


REPLICATION_TABLES: Mapping[str, Callable[[], str]] = {
    "replication": replication_table,
    "replication-effects": effects_table,
}
