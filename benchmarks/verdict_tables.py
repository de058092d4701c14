"""The tables of docs/results/verdicts.md, from benchmarks/results.

    python benchmarks/verdict_tables.py [--write docs/results/verdicts.md]

With ``--write`` each table takes the place of the text between its two marks in the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentguard.files import write_atomic
from latentguard.study.claims import CLAIMS

RESULTS = Path(__file__).parent / "results"

VERDICTS = ("replicated", "replicated, but form explains it", "not replicated", "cannot tell")

TRUE_WORLDS = ("paper",)
"""Worlds in which each claim is true."""

NO_PATTERN = ("null",)
"""Worlds in which none is."""

ABOUT_REFUSAL = (12, 13)
"""Claims about refusal alone, which t_post truly holds in worlds of form at t_inst."""

JUDGES = {"built in": "built in", "paper": "the paper's phrases"}

Row = Sequence[object]


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page")
    page = parser.parse_args().write
    tables = {
        "planted": planted_table(_read("planted-worlds.json")),
        "before": planted_table(_read("planted-worlds-before.json")),
        "coverage": coverage_table(_read("coverage.json")),
        "edge": edge_table(_read("coverage.json")),
        "judge": judge_table(_read("judge.json")),
    }
    if page is None:
        print("\n\n".join(tables.values()))
        return
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    write_atomic(page, text)


def planted_table(counts: dict[str, dict[str, dict[str, int]]]) -> str:
    """Claim by world: how often each verdict came out, and whether that is what is demanded."""
    worlds = list(counts)
    n = [max(sum(verdicts.values()) for verdicts in counts[world].values()) for world in worlds]
    claims = sorted({int(claim) for world in worlds for claim in counts[world]})
    rows = [
        (f"{claim}. {CLAIMS[claim - 1].name}", *(_cell(counts[w], w, claim) for w in worlds))
        for claim in claims
    ]
    head = [f"{world} (n = {count})" for world, count in zip(worlds, n, strict=True)]
    return _markdown(["claim", *head], rows)


def _cell(counts: dict[str, dict[str, int]], world: str, claim: int) -> str:
    verdicts = counts.get(str(claim), {})
    total = sum(verdicts.values())
    short = dict(zip(VERDICTS, ("yes", "form", "no", "?"), strict=True))
    shares = ", ".join(f"{short[v]} {verdicts[v]}" for v in VERDICTS if verdicts.get(v))
    return shares if is_as_demanded(verdicts, total, world, claim) else f"**{shares}**"


def is_as_demanded(verdicts: dict[str, int], total: int, world: str, claim: int) -> bool:
    """Whether the share of verdicts is what issue 18 asks of a world of this kind."""
    plainly = verdicts.get(VERDICTS[0], 0)
    if world in TRUE_WORLDS:
        return plainly >= 0.9 * total
    if world in NO_PATTERN:
        return plainly + verdicts.get(VERDICTS[1], 0) <= 0.025 * total
    return not plainly or claim in ABOUT_REFUSAL


def coverage_table(found: dict[str, Any]) -> str:
    """Interval and distribution by number of prompts."""
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for one in found["intervals"]:
        cell = f"{one['coverage']:.3f}"
        if one["coverage"] < 0.9:
            cell = f"**{cell}**"
        rows.setdefault((one["interval"], one["distribution"]), {})[one["n"]] = cell
    sizes = sorted({one["n"] for one in found["intervals"]})
    head = ["interval", "data", *(f"n = {n}" for n in sizes)]
    return _markdown(head, [(*names, *(of[n] for n in sizes)) for names, of in rows.items()])


def edge_table(found: dict[str, Any]) -> str:
    """Conditions and verdict by number of prompts."""
    rows: dict[tuple[int, str], dict[int, str]] = {}
    for one in found["verdicts at the edge of truth"]:
        rows.setdefault((one["conditions"], one["verdict"]), {})[one["n"]] = f"{one['share']:.3f}"
    sizes = sorted({one["n"] for one in found["verdicts at the edge of truth"]})
    head = ["conditions", "wrong verdict", *(f"n = {n}" for n in sizes)]
    return _markdown(head, [(*names, *(of[n] for n in sizes)) for names, of in rows.items()])


def judge_table(rates: list[dict[str, Any]]) -> str:
    """Kind of reply by rule, on replies that the built-in judge was not fitted to."""
    cells: dict[str, dict[str, str]] = {}
    counts: dict[str, int] = {}
    for one in rates:
        if one["counted"] == "refusal":
            column = f"{JUDGES.get(one['judge'], one['judge'])}, {one['part']}"
            text = f"{one['error']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
            cells.setdefault(one["kind"], {})[column] = text
            counts[f"{one['kind']} {one['part']}"] = one["n"]
    columns = list(next(iter(cells.values())))
    rows = [
        (kind, counts[f"{kind} held"], counts[f"{kind} tune"], *(of[c] for c in columns))
        for kind, of in cells.items()
    ]
    return _markdown(["reply, by hand", "n held", "n tune", *columns], rows)


def _markdown(head: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
