"""Tables of what labels teach a guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from docpages.markdown_table import interval, markdown_table, read_result
from latentguard.report.page_table import format_interval

RECORD = "adaptation-default"
COMMAND = "python benchmarks/adaptation.py --traffic FILE --others FILE ... --cache DIR --out FILE"
ARMS = ("adapt, suggested labels", "adapt", "new probe", "n-grams", "as it is")


def curve_table(figure: str) -> str:
    """One figure by number of labels, a column an arm."""
    cells: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in read_result(RECORD)["curve"]:
        cells.setdefault(row["labels"], {})[row["arm"]] = row
    rows = [
        [
            str(count),
            f"{arms['adapt']['harmful']:.0f}",
            *(_mean(arms[arm][figure]) for arm in ARMS),
        ]
        for count, arms in cells.items()
    ]
    return markdown_table(["labels", "harmful among random ones", *ARMS], rows, COMMAND)


def cost_table() -> str:
    """Seconds that learning takes, the prompts being read."""
    curve = [row for row in read_result(RECORD)["curve"] if row["arm"] == "adapt"]
    rows = [[str(row["labels"]), f"{row['seconds']:.1f}"] for row in curve]
    return markdown_table(["labels", "seconds"], rows, COMMAND)


def others_table() -> str:
    """Sets that were not learned, before and after."""
    figures = ("auroc", "caught", "falsely flagged")
    rows = [
        [
            f"{one['set']} ({one['n'][1]} + {one['n'][0]})",
            *(interval(one[side][figure]) for figure in figures for side in ("before", "after")),
        ]
        for one in read_result(RECORD)["others"]
    ]
    head = [f"{figure}, {side}" for figure in ("AUROC", *figures[1:]) for side in SIDES]
    return markdown_table(["set (harmful + harmless)", *head], rows, COMMAND)


SIDES = ("before", "after")


def _mean(record: Sequence[float]) -> str:
    return format_interval(*record)


ADAPTATION_TABLES: dict[str, Callable[[], str]] = {
    "adaptation-auroc": lambda: curve_table("auroc"),
    "adaptation-f1": lambda: curve_table("f1"),
    "adaptation-false": lambda: curve_table("falsely flagged"),
    "adaptation-cost": cost_table,
    "adaptation-others": others_table,
}
"""Name on a page -> what makes the table."""
