"""Tables of the threat model, from ``benchmarks/results/attacks.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from docpages.markdown_table import markdown_table, read_result
from latentguard.report.page_table import format_interval

COLUMNS = (
    *(("tiny", "before"), ("tiny", "after"), ("default", "before"), ("default", "after")),
    ("default", "after, --rate-of text"),
)

ATTACKS = "python benchmarks/attacks.py attacks --before CHECKOUT"
LOAD = "python benchmarks/attacks.py load"
COST = "python benchmarks/attacks.py cost --model default --guard src/latentguard/guard/default"

Row = list[str]


def hidden_rows() -> tuple[list[str], list[Row]]:
    """Hidden requests that were answered or sent on, of those that are refused by themselves."""
    attacks = _read()["attacks"]
    head = ["where the request is hidden", "answered by", *(f"{m}, {s}" for m, s in COLUMNS)]
    rows = []
    parts = {"own model": "own model", "upstream": "upstream", "hidden words": "upstream"}
    for part, answered_by in parts.items():
        for name in attacks["tiny"]["after"][part]:
            cells = [_share(attacks, column, part, name) for column in COLUMNS]
            rows.append([name, answered_by, *cells])
    cells = [_share(attacks, column, "allowed on error") for column in COLUMNS]
    rows.append(["nowhere, but the guard is made late (`--on-error allow`)", "upstream", *cells])
    return head, rows


def _share(attacks: Mapping[str, Any], column: tuple[str, str], part: str, name: str = "") -> str:
    model, side = column
    figures = attacks.get(model, {}).get(side, {}).get(part)
    if figures is None:
        return "not run"
    own = figures[name] if name else figures
    return f"{own['let_through']} of {own['n']}"


def stopping_rows() -> tuple[list[str], list[Row]]:
    """What one client does to the service and to the others."""
    before, after = (_read()["attacks"]["tiny"][side] for side in ("before", "after"))
    rows = []
    for name, words in (
        ("many values", "1 MiB of numbers"),
        ("long text", "a prompt of 1 MB"),
    ):
        for key, what in (
            ("cpu_seconds", "processor seconds"),
            ("peak_memory_grew_mib", "memory, MiB"),
            ("health_silent_wall_seconds", "health silent, seconds"),
        ):
            rows.append([f"{words}: {what}", _plain(before[name][key]), _plain(after[name][key])])
    for key, words in (
        ("alone_wall_seconds", "a chat alone, seconds"),
        ("crowded_wall_seconds", "a chat beside eight long ones of another client, seconds"),
    ):
        rows.append([words, _plain(before["ninth chat"][key]), _plain(after["ninth chat"][key])])
    n = after["neighbour"]["n"]
    for key, words in (
        ("quiet_p95_wall_seconds", f"a client alone, 95th percentile of {n}, seconds"),
        ("noisy_p95_wall_seconds", "the same beside 128 long inputs at once"),
        ("ratio", "ratio of both"),
    ):
        rows.append([words, _plain(before["neighbour"][key]), _plain(after["neighbour"][key])])
    default = _read()["attacks"]["default"]["after"]["neighbour"]
    rows.append(
        [f"the ratio with the default guard (n = {default['n']})", "", _plain(default["ratio"])]
    )
    idle = [side["idle connections"]["health_port_answers"] for side in (before, after)]
    rows.append(["health answers beside 1,030 idle connections", *map(_yes, idle)])
    for name in after["odd upstream replies"]:
        statuses = [str(side["odd upstream replies"][name]) for side in (before, after)]
        rows.append([f"status for an upstream's odd reply: {name}", *statuses])
    return ["tiny model", "before", "after"], rows


def load_rows() -> tuple[list[str], list[Row]]:
    """Verdicts under load, memory, cancelled requests, restarts, first token."""
    load = _read()["load"]["tiny"]["after"]
    storm, minute = load["storm"], load["a minute at 64 connections"]
    memory, left = load["memory"], load["cancellations"]
    rows = [
        [
            f"{storm['requests']:,} requests of mixed sizes at 64 connections",
            f"{storm['lost']} lost, {storm['wrong']} of {storm['verdicts']:,} verdicts wrong",
        ],
        [
            f"{minute['wall_seconds']:g} seconds at 64 connections",
            ", ".join(f"{count:,} x {name}" for name, count in minute["statuses"].items()),
        ],
        [
            f"resident memory over {memory['requests']:,} requests",
            f"{memory['mib'][0]:g} MiB after a tenth, {memory['mib'][-1]:g} MiB at the end",
        ],
        [
            f"{left['requests']:,} clients that leave at any moment",
            f"{int(sum(left['left_behind'].values()))} prompts and chats left behind; "
            f"the next request: {left['next_status']}",
        ],
    ]
    for name, figures in load.get("others", {}).items():
        rows.append([name, figures])
    return ["tiny model", "result"], rows


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _read() -> dict[str, Any]:
    results: dict[str, Any] = read_result("attacks")
    return results


def _table(rows: Callable[[], tuple[list[str], list[Row]]], command: str) -> str:
    return markdown_table(*rows(), command)


def cost_rows() -> tuple[list[str], list[Row]]:
    """Processor time of a new turn, every message read against the chat in context only."""
    rows = []
    for turns, figures in _read()["cost"]["default"]["after"].items():
        if isinstance(figures, dict):
            low, high = figures["ratio_interval"]
            ratio = f"{figures['ratio_to_context_only']:.2f} [{low:.2f}, {high:.2f}]"
            name = turns.replace("1 turns", "1 turn")
            rows.append([name, f"{figures['cpu_seconds']:.2f}", ratio, str(figures["n"])])
    return ["chat of", "seconds of a new turn", "over the context alone", "n"], rows


BUILD_UP = "python benchmarks/build_up.py --guard src/latentguard/guard/default --out FILE"


def build_up_rates_table() -> str:
    """Chats that build up over turns and are blocked, by how they end."""
    record = read_result("build-up-smollm2-135m")
    rows = dict[str, list[str]]()
    for one in record["rates"]:
        rows.setdefault(one["flagged"], []).append(_estimate(one, "share"))
    head = ["blocked", *dict.fromkeys(one["ending"] for one in record["rates"])]
    return markdown_table(head, [[what, *cells] for what, cells in rows.items()], BUILD_UP)


def build_up_areas_table() -> str:
    """How well such chats are told from those that end harmlessly, by what is read."""
    record = read_result("build-up-smollm2-135m")
    rows = dict[str, list[str]]()
    for one in record["areas"]:
        rows.setdefault(one["read"], []).append(_estimate(one, "auroc"))
    endings = dict.fromkeys(one["ending"] for one in record["areas"])
    head = ["read", *(f"AUROC, {ending} against harmless" for ending in endings)]
    return markdown_table(head, [[what, *cells] for what, cells in rows.items()], BUILD_UP)


def _estimate(row: Mapping[str, Any], figure: str) -> str:
    return format_interval(row[figure], row["low"], row["high"])


ATTACK_TABLES: dict[str, Callable[[], str]] = {
    "attacks-hidden": partial(_table, hidden_rows, ATTACKS),
    "attacks-stopping": partial(_table, stopping_rows, ATTACKS),
    "attacks-load": partial(_table, load_rows, LOAD),
    "attacks-cost": partial(_table, cost_rows, COST),
    "build-up-rates": build_up_rates_table,
    "build-up-areas": build_up_areas_table,
}
"""Name on a page -> what makes the table."""
