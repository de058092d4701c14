"""Tables of the verdicts: planted worlds, coverage of intervals, the judge's errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

from docpages.markdown_table import interval, markdown_table, read_result
from latentguard.study.claims import CLAIMS, Verdict

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

SHORT = dict(zip(VERDICTS, ("yes", "form", "no", "?"), strict=True))

TRUE_WORLDS = ("paper",)
"""Worlds in which each claim is true."""

NO_PATTERN = ("null",)
"""Worlds in which none is."""

ABOUT_REFUSAL = (12, 13)
"""Claims about refusal alone, which t_post truly holds in worlds of form at t_inst."""

JUDGES = {"built in": "built in", "paper": "the paper's phrases"}

COVERAGE = "python benchmarks/coverage.py --out benchmarks/results/coverage.json"

Counts = Mapping[str, int]
"""Verdict -> seeds."""


def planted_table(result: str) -> str:
    """Claim by world: how often each verdict came out, and whether that is what is demanded."""
    counts: Mapping[str, Mapping[str, Counts]] = read_result(result)
    worlds = list(counts)
    n = [max(sum(verdicts.values()) for verdicts in counts[world].values()) for world in worlds]
    claims = sorted({int(claim) for world in worlds for claim in counts[world]})
    rows = [
        (f"{claim}. {CLAIMS[claim - 1].name}", *(_cell(counts[w], w, claim) for w in worlds))
        for claim in claims
    ]
    head = [f"{world} (n = {count})" for world, count in zip(worlds, n, strict=True)]
    command = f"python benchmarks/planted_worlds.py --record F.jsonl --out {result}.json"
    return markdown_table(["claim", *head], rows, command)


def _cell(counts: Mapping[str, Counts], world: str, claim: int) -> str:
    verdicts = counts.get(str(claim), {})
    total = sum(verdicts.values())
    shares = ", ".join(f"{SHORT[v]} {verdicts[v]}" for v in VERDICTS if verdicts.get(v))
    return shares if is_as_demanded(verdicts, total, world, claim) else f"**{shares}**"


def is_as_demanded(verdicts: Counts, total: int, world: str, claim: int) -> bool:
    """Whether the share of verdicts is what is asked of a world of this kind.

    - Claims are true: 9 of 10 are replicated.
    - None is: at most 2.5 % are replicated, form or not.
    - Form alone: none is replicated, but claims about refusal.
    """
    plainly = verdicts.get(VERDICTS[0], 0)
    if world in TRUE_WORLDS:
        return plainly >= 0.9 * total
    if world in NO_PATTERN:
        return plainly + verdicts.get(VERDICTS[1], 0) <= 0.025 * total
    return not plainly or claim in ABOUT_REFUSAL


def coverage_table() -> str:
    """Interval and distribution by number of prompts."""
    found = read_result("coverage")
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for one in found["intervals"]:
        cell = f"{one['coverage']:.3f}"
        if one["coverage"] < 0.9:
            cell = f"**{cell}**"
        rows.setdefault((one["interval"], one["distribution"]), {})[one["n"]] = cell
    sizes = sorted({one["n"] for one in found["intervals"]})
    head = ["interval", "data", *(f"n = {n}" for n in sizes)]
    return markdown_table(
        head, [(*map(str, names), *(of[n] for n in sizes)) for names, of in rows.items()], COVERAGE
    )


def edge_table() -> str:
    """Conditions and verdict by number of prompts."""
    found = read_result("coverage")
    rows: dict[tuple[int, str], dict[int, str]] = {}
    for one in found["verdicts at the edge of truth"]:
        rows.setdefault((one["conditions"], one["verdict"]), {})[one["n"]] = f"{one['share']:.3f}"
    sizes = sorted({one["n"] for one in found["verdicts at the edge of truth"]})
    head = ["conditions", "wrong verdict", *(f"n = {n}" for n in sizes)]
    return markdown_table(
        head, [(*map(str, names), *(of[n] for n in sizes)) for names, of in rows.items()], COVERAGE
    )


def judge_table() -> str:
    """Kind of reply by rule and part of the replies."""
    rates: list[dict[str, Any]] = read_result("judge")
    cells: dict[str, dict[str, str]] = {}
    counts: dict[str, int] = {}
    for one in rates:
        if one["counted"] == "refusal":
            column = f"{JUDGES.get(one['judge'], one['judge'])}, {one['part']}"
            cells.setdefault(one["kind"], {})[column] = interval(one, "error")
            counts[f"{one['kind']} {one['part']}"] = one["n"]
    columns = list(next(iter(cells.values())))
    rows = [
        (kind, str(counts[f"{kind} held"]), str(counts[f"{kind} tune"]), *(of[c] for c in columns))
        for kind, of in cells.items()
    ]
    head = ["reply, by hand", "n held", "n tune", *columns]
    command = "python benchmarks/judge.py --out benchmarks/results/judge.json"
    return markdown_table(head, rows, command)


VERDICT_TABLES: dict[str, Callable[[], str]] = {
    "planted-worlds": partial(planted_table, "planted-worlds"),
    "planted-worlds-before": partial(planted_table, "planted-worlds-before"),
    "coverage": coverage_table,
    "coverage-edge": edge_table,
    "judge-errors": judge_table,
}
"""Name on a page -> what makes the table."""
