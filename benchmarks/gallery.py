"""Publishes reports of studies without any prompt or reply: Markdown tables and SVG figures.

    python benchmarks/gallery.py reports/a reports/b --out docs/gallery --data-dir DATA

Each folder is a report of 'latentguard study', or one that is published already, whose files stay
as they are. The first page compares all of them, claim by claim.
Nothing is written if a text of the prompt pools, or a reply in a store, is in one of the pages.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from latentguard.report.document import Table, file_names
from latentguard.report.page_table import format_interval
from latentguard.study.claims import CLAIMS
from latentguard.study.claims_report import COLUMNS, TITLE
from latentguard.study.compare import ClaimRow, StudyReport, compare, read_record, reports_of
from latentguard.study.prompt_groups import PromptPools, contrast_pools, read_pools
from latentguard.study.run import STORE

SHORTEST = 24
"""Characters of a text from which it is looked for; shorter ones are words of any report."""

LONGEST = 50
"""Rows of a table on a page; longer ones are files beside it."""

OMITTED = ("in the paper", "deviations (protocol)")
"""Columns of the claims that make rows high; the first page and a table of their own have them."""

CLAIMS_FILE, PROVENANCE = "claims.csv", "provenance.json"
"""Files of a published report; a report that is not published has no such."""

Pages = Mapping[str, str]
"""Path below the gallery -> content."""


def pages_of(folders: Sequence[Path]) -> dict[str, str]:
    """All files of the gallery."""
    is_out = [(folder / PROVENANCE).exists() for folder in folders]
    records = [
        published_record(folder) if done else read_record(folder)
        for folder, done in zip(folders, is_out, strict=True)
    ]
    reports = reports_of(folders, records)
    names = file_names([one.label for one in reports])
    pages = {"index.md": first_page(reports, names)}
    for name, folder, done, record in zip(names, folders, is_out, records, strict=True):
        files = published_files(folder) if done else report_pages(folder, record)
        pages |= {f"{name}/{path}": text for path, text in files.items()}
    return pages


def published_record(folder: Path) -> dict[str, Any]:
    """What the first page needs of a published report."""
    with (folder / CLAIMS_FILE).open(encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    cells = [list(map(_cell, row)) for row in rows]
    meta = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    return {"meta": meta, "tables": [dict(title=TITLE, columns=columns, rows=cells)], "curves": []}


def _cell(text: str) -> str | float | None:
    """A cell as it was before it was written to CSV."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text or None


def published_files(folder: Path) -> dict[str, str]:
    """The files of a published report."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in paths}


def first_page(reports: Sequence[StudyReport], names: Sequence[str]) -> str:
    """What all reports say: verdicts, effects, then a paragraph a claim."""
    page = compare(reports)
    section, about = page.sections[:2]
    verdicts, claims = (part for part in section.parts if isinstance(part, Table))
    links = [f"- [{one.label}]({name}/index.md)" for one, name in zip(reports, names, strict=True)]
    parts = [
        "# Gallery: the paper's claims on the models at hand",
        section.text,
        verdicts.markdown(),
        "Every figure and table of each study:",
        "\n".join(links),
        "## Effects",
        claims.markdown(),
        "## Claim by claim",
        *(paragraph(number, reports) for number in range(1, len(CLAIMS) + 1)),
        "## What was compared",
        *(part.markdown() for part in about.parts if isinstance(part, Table)),
    ]
    return "\n\n".join(parts) + "\n"


def paragraph(number: int, reports: Sequence[StudyReport]) -> str:
    """One claim as a list: what the paper says, what each report sees, what form says."""
    claim = CLAIMS[number - 1]
    lines = [f"**{number}. {claim.name}**", "", f"- The paper ({claim.where}): {claim.paper}."]
    for report in reports:
        row = next((one for one in report.claims if one.number == number), None)
        if row is not None:
            lines.append(f"- {report.label}: {_sentence(row)}")
    return "\n".join(lines)


def _sentence(row: ClaimRow) -> str:
    cells = dict(zip(COLUMNS[COLUMNS.index("verdict") + 1 :], row.rest, strict=False))
    seen = _number(cells["value"], cells["low"], cells["high"])
    effect = f" ({cells['effect that decides']}: {seen}, n = {cells['n']})" if seen else ""
    form = _number(cells["form value"], cells["form low"], cells["form high"])
    control = f" Form: {cells['form control']}: {form}." if form else ""
    return f"{row.verdict}{effect}.{control}"


def _number(*cells: object) -> str:
    if any(not isinstance(cell, (int, float)) for cell in cells):
        return ""
    return format_interval(*cells)  # type: ignore[arg-type]


def report_pages(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """One report: each table as Markdown, each figure as SVG."""
    pages, shown = {}, []
    for title, name in zip(record["figures"], file_names(record["figures"]), strict=True):
        path = folder / "figures" / f"{name}.svg"
        if path.exists():
            pages[f"{name}.svg"] = path.read_text(encoding="utf-8")
            shown.append(f"### {title}\n\n![{title}]({name}.svg)")
    tables = [
        Table(one["title"], tuple(one["columns"]), tuple(map(tuple, one["rows"])), one["note"])
        for one in record["tables"]
    ]
    heads = ["# " + record["title"], "[All models](../index.md)"]
    bodies = [_without_columns(tables[0], OMITTED).markdown()]
    for table, name in zip(tables[1:], file_names([one.title for one in tables[1:]]), strict=True):
        if len(table.rows) > LONGEST:
            pages[f"{name}.csv"] = table.csv()
            link = f"[{len(table.rows)} rows, as CSV]({name}.csv)"
            bodies.append(f"**{table.title}.** {table.note}\n\n{link}")
        else:
            bodies.append(table.markdown())
    pages["index.md"] = "\n\n".join(
        [*heads, bodies[0], "## Figures", *shown, "## Tables", *bodies[1:]]
    )
    pages["index.md"] += "\n"
    pages[CLAIMS_FILE] = tables[0].csv()
    pages[PROVENANCE] = json.dumps(_published(record["meta"]), indent=1) + "\n"
    return pages


def _published(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a report was made of; a model's folder is the runner's own, so its name stands alone."""
    return {**meta, "model": {**meta["model"], "model": meta["name"]}}


def _without_columns(table: Table, names: Sequence[str]) -> Table:
    shown = [slot for slot, name in enumerate(table.columns) if name not in names]
    rows = tuple(tuple(row[slot] for slot in shown) for row in table.rows)
    return replace(table, columns=tuple(table.columns[slot] for slot in shown), rows=rows)


def pool_texts(pools: PromptPools) -> set[str]:
    """Every text of the pools."""
    return {p.text for f in fields(pools) for p in getattr(pools, f.name)}


def stored_replies(folder: Path) -> Iterator[str]:
    """Every reply in the store of a report; none without one."""
    path = folder / STORE
    if not path.exists():
        return
    base = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    for (value,) in base.execute("SELECT value FROM kept WHERE substr(value, 1, 1) = X'7B'"):
        try:
            record = json.loads(value)
        except ValueError:  # a state that happens to begin like JSON
            continue
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            yield record["text"]
    base.close()


def leaks(pages: Pages, texts: Iterable[str]) -> list[str]:
    """Paths of the pages in which one of the texts is, whatever the white space and case."""
    wanted = {plain for text in texts if len(plain := _plain(text)) >= SHORTEST}
    plain_pages = {path: _plain(content) for path, content in pages.items()}
    return [
        path for path, content in plain_pages.items() if any(text in content for text in wanted)
    ]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().lower()


def write(pages: Pages, out: Path) -> None:
    """Write the pages."""
    for path, content in pages.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(content, encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Publish the reports; 1 if a text would leak."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/gallery"))
    parser.add_argument("--data-dir", type=Path, default=None)
    given = parser.parse_args(words)
    pages = pages_of(given.reports)
    texts = pool_texts(contrast_pools())
    if given.data_dir is not None:
        texts |= pool_texts(read_pools(given.data_dir))
    for folder in given.reports:
        texts.update(stored_replies(folder))
    found = leaks(pages, texts)
    if found:
        print(
            f"Nothing was written: prompts or replies are in {', '.join(found)}.", file=sys.stderr
        )
        return 1
    write(pages, given.out)
    print(given.out / "index.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
