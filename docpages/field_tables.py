"""Tables beside published guards, and of decisions on traffic of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from docpages.markdown_table import (
    GUARDS,
    ROOT,
    interval,
    markdown_table,
    read_result,
    read_results,
)

PUBLISHED = ROOT / "src" / "latentguard" / "benchmark" / "published.jsonl"

BENCHMARK = "latentguard benchmark GUARD --data-dir DATA"
DECISIONS = "python benchmarks/decisions.py default --data-dir DATA --work DIR --json FILE"

SETS = ("toxicchat", "openai_moderation")
"""Sets of which most guards publish an F1."""

OURS = {
    ("this guard", "f1"): "own threshold",
    ("this guard", "f1_at_half"): "probability above 0.5",
    ("the paper's rule", "f1"): "the paper's rule",
}
"""Row of a guard and its figure -> its name on pages."""

README_GUARDS = ("Llama Guard 3 8B", "Qwen3Guard-Gen 0.6B, strict", "Qwen3Guard-Gen 0.6B, loose")
"""Published guards on the README; the page has all."""


def published_table(only: tuple[str, ...] = ()) -> str:
    """F1 of our guards and of published ones, on two sets; only the default's beside ``only``."""
    rows = []
    for model, measured in read_results("field", GUARDS)[: 1 if only else None]:
        for (guard, metric), label in OURS.items():
            rows.append([f"**{model}, {label}**", *_f1_cells(measured, guard, metric)])
    default = read_result("field-default")
    rows.append(["**n-grams**", *_f1_cells(default, "n-grams", "f1")])
    for guard, values in _published().items():
        if not only or guard in only:
            rows.append([guard, *(values.get(name, "") for name in SETS)])
    counts = [default[name]["figures"]["this guard"] for name in SETS]
    n = [f"{one['harmful']} + {one['harmless']}" for one in counts]
    head = ["guard", f"ToxicChat (ours: {n[0]})", f"OpenAI moderation (ours: {n[1]})"]
    return markdown_table(head, rows, BENCHMARK)


def _f1_cells(measured: Mapping[str, Any], guard: str, metric: str) -> list[str]:
    return [interval(measured[name]["figures"][guard][metric]) for name in SETS]


def _published() -> dict[str, dict[str, str]]:
    """Guard -> set -> F1 as published, of the guards that have both sets."""
    found: dict[str, dict[str, str]] = {}
    for line in PUBLISHED.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["set"] in SETS:
            metric = "" if row["metric"] == "F1" else f" ({row['metric']})"
            found.setdefault(row["model"], {})[row["set"]] = f"{row['value']:.2f}{metric}"
    return {guard: values for guard, values in found.items() if len(values) == len(SETS)}


FIGURES = {
    "f1": "F1",
    "f1_at_half": "F1, p > 0.5",
    "f1_at_5": "F1 at 5 % FPR",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "tpr_at_1": "TPR at 1 % FPR",
    "recall": "recall",
    "fpr": "FPR",
}
"""Figure in the results -> column."""


def field_set_table(name: str) -> str:
    """Every figure of each guard and its baselines on one set."""
    rows = []
    for model, measured in read_results("field", GUARDS):
        figures = measured[name]["figures"]
        rows.append([model, *_figure_cells(figures["this guard"])])
        rows.append(["the paper's rule on it", *_figure_cells(figures["the paper's rule"])])
    words = read_result("field-default")[name]["figures"]["n-grams"]
    rows.append(["n-grams", *_figure_cells(words)])
    return markdown_table(["guard", *FIGURES.values()], rows, BENCHMARK)


def _figure_cells(figures: Mapping[str, Any]) -> list[str]:
    return [interval(figures[key]) for key in FIGURES]


RATES = {
    "fpr_shipped": "FPR, shipped",
    "fpr_traffic": "FPR, `--traffic`",
    "recall_shipped": "recall, shipped",
    "recall_traffic": "recall, `--traffic`",
    "recall_best": "recall, best at 5 % FPR",
}
SCORES = {
    "f1_shipped": "F1, shipped",
    "f1_balanced": "F1, `--balanced`",
    "f1_traffic": "F1, `--balanced --traffic`",
    "f1_best": "F1, best",
    "ece_before": "ECE, as fitted",
    "ece_traffic": "ECE, `--traffic`",
    "ece_floor_before": "ECE of a perfect map",
}


def decisions_table(columns: Mapping[str, str]) -> str:
    """Figures of the shipped and of the moved threshold, a row a set."""
    rows = []
    for name, one in read_result("decisions-smollm2-135m")["sets"].items():
        counts = [name, f"{one['n']}", f"{one['harmful_share']:.2f}"]
        rows.append([*counts, *(f"{one[key]:.2f}" for key in columns)])
    return markdown_table(["set", "n", "harmful", *columns.values()], rows, DECISIONS)


WORLDS = {
    "as at calibration": "as at calibration",
    "lower by 1": "harmless scores lower by 1",
    "lower by 2": "harmless scores lower by 2",
    "higher by 0.3": "harmless scores higher by 0.3",
    "harmful ones lower by 0.5": "harmful scores lower by 0.5",
    "narrower": "harmless lower by 0.5, narrower (0.8)",
    "wider": "harmless lower by 0.5, wider (1.2)",
    "nothing harmful": "harmless lower by 0.5, nothing harmful",
    "one in a hundred": "the same, one in a hundred harmful",
    "half harmful": "the same, half harmful",
}
"""World in the results -> name on the page."""


def planted_traffic_table() -> str:
    """Rates in worlds whose scores are known, at calibration's threshold and at the moved one."""
    planted = read_result("decisions-smollm2-135m")["planted"]
    rows = [
        [label, *_planted_cells(planted[f"{name}, 500 prompts"])] for name, label in WORLDS.items()
    ]
    head = ["scores of the traffic", "FPR, calibration's threshold", "FPR, `--traffic`"]
    head += ["highest of three", "recall, calibration's", "recall, `--traffic`"]
    return markdown_table([*head, "recall, best at 5 % FPR"], rows, DECISIONS)


def _planted_cells(one: Mapping[str, Any]) -> list[str]:
    fpr, highest, recall = one["mean_fpr"], one["highest_fpr"], one["mean_recall"]
    rates = [f"{fpr['calibration']:.3f}", f"{fpr['traffic']:.3f}", f"{highest['traffic']:.3f}"]
    if not one["world"]["share"]:
        return [*rates, "", "", ""]
    values = (recall["calibration"], recall["traffic"], one["best_recall"])
    return [*rates, *(f"{value:.2f}" for value in values)]


FIELD_TABLES: dict[str, Callable[[], str]] = {
    "published": published_table,
    "published-short": partial(published_table, README_GUARDS),
    **{f"field-{name}": partial(field_set_table, name) for name in (*SETS, "xstest")},
    "decisions-rates": partial(decisions_table, RATES),
    "decisions-scores": partial(decisions_table, SCORES),
    "planted-traffic": planted_traffic_table,
}
"""Name on a page -> what makes the table."""
