"""Result tables of the pages, made from benchmarks/results.

    python -m docpages.result_tables        # writes the tables anew

A page says ``<!-- table: NAME -->`` and ``<!-- end -->``; the table stands between, with the
command that made its figures. A test compares every page with its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from docpages.adaptation_tables import ADAPTATION_TABLES
from docpages.attack_tables import ATTACK_TABLES
from docpages.calibration_tables import CALIBRATION_TABLES
from docpages.field_tables import FIELD_TABLES
from docpages.garak_tables import GARAK_TABLES
from docpages.lever_tables import LEVER_TABLES
from docpages.library_tables import LIBRARY_TABLES
from docpages.markdown_table import (
    MODELS,
    ROOT,
    TIMED_MODELS,
    interval,
    markdown_table,
    read_result,
)
from docpages.reading_tables import READING_TABLES
from docpages.replication_tables import REPLICATION_TABLES
from docpages.reply_tables import REPLY_TABLES
from docpages.verdict_tables import VERDICT_TABLES
from latentguard.report.page_table import format_interval

MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

RULES = {
    "length": "length of the prompt",
    "random direction (median of 5, better sign)": "random direction, median of five",
    "n-grams, guard prompts": "n-grams, same training prompts",
    "the paper's rule: AdvBench + Alpaca, t_inst, centroid, no refusal filter": "the paper's rule",
    "AdvBench + Alpaca, pooled, linear": "our probe on the paper's training data",
    "default: guard prompts, pooled, linear": "**our probe on our training data**",
}
"""Rule in the results -> name on pages."""

GUARD = "default: guard prompts, pooled, linear"
PAPER = "the paper's rule: AdvBench + Alpaca, t_inst, centroid, no refusal filter"
WORDS = "n-grams, guard prompts"

SETS = {
    "jbb": "JailbreakBench",
    "xstest": "XSTest",
    "openai_moderation": "OpenAI moderation",
    "built-in pairs, test": "matched pairs, unseen",
}
"""Set in the results -> name on pages."""


DETECTION = "python benchmarks/detection.py --model MODEL --data-dir DATA"
"""The command that made the detection results."""


def fill_tables(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return MARKED.sub(fill, text)


def pages_with_tables() -> list[Path]:
    """Every page that has a generated table."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if MARKED.search(page.read_text("utf-8"))]


# ---- detection


def _detection_rows(model: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(set, rule) -> row, of one model's detection results."""
    rows = {}
    for one in read_result(f"detection-{model}")["tables"]:
        if one["columns"][0] == "set":
            for row in one["rows"]:
                record = dict(zip(one["columns"], row, strict=True))
                rows[record["set"], record["rule"]] = record
    return rows


def _means(model: str) -> dict[str, float]:
    """Rule -> mean AUROC over the eight public sets."""
    tables = read_result(f"detection-{model}")["tables"]
    (summary,) = [table for table in tables if table["columns"][:2] == ["rule", "mean of 8"]]
    return {row[0]: row[1] for row in summary["rows"]}


PAPER_GUARD = (
    "python benchmarks/paper_guard.py --model MODEL --data-dir DATA --store FILE --out FILE"
)
"""The command that made the results of the paper's own guard."""


def paper_guard_table() -> str:
    """AUROC of the paper's own guard and of its rule without the choice, a block a model."""
    rows = []
    for model, name in MODELS.items():
        if not (ROOT / "benchmarks" / "results" / f"paper-guard-{model}.json").exists():
            continue
        for number, one in enumerate(read_result(f"paper-guard-{model}")["sets"]):
            cells = (one["as_the_paper"], one["unfiltered"], one["difference"])
            shown = [format_interval(*cell) for cell in cells]
            n = f"{one['harmful']} + {one['harmless']}"
            rows.append(["" if number else name, one["name"], n, *shown])
    head = ["model", "set", "n", "the paper's own guard", "without its choice", "difference"]
    return markdown_table(head, rows, PAPER_GUARD)


def _interval(row: Mapping[str, Any], metric: str = "AUROC") -> str:
    return interval(row, metric, f"{metric}, ")


def guards_table() -> str:
    """A row a model: the guard beside n-grams and the paper's rule."""
    rows = []
    for model, name in MODELS.items():
        cells = _detection_rows(model)
        means = _means(model)
        on_set = [_interval(cells["jbb", rule]) for rule in (GUARD, WORDS, PAPER)]
        on_all = [f"{means[rule]:.2f}" for rule in (GUARD, WORDS, PAPER)]
        strict = _interval(cells["jbb", GUARD], "TPR at 1% FPR")
        rows.append([name, *on_set, strict, " / ".join(on_all)])
    head = [
        "model",
        "guard",
        "n-grams",
        "the paper's rule",
        "guard, share caught at 1 % FPR",
        "mean of 8 sets: guard / n-grams / rule",
    ]
    return markdown_table(head, rows, DETECTION)


def controls_table() -> str:
    """A row a rule, a column a model, on pairs that differ in harm alone."""
    cells = {model: _detection_rows(model) for model in MODELS}
    rows = [
        [label, *(_interval(cells[model]["built-in pairs, test", rule]) for model in MODELS)]
        for rule, label in RULES.items()
    ]
    return markdown_table(["rule", *MODELS.values()], rows, DETECTION)


def detection_table() -> str:
    """AUROC of every rule on four sets, a block a model."""
    rows = []
    for model, name in MODELS.items():
        cells = _detection_rows(model)
        means = _means(model)
        for number, (rule, label) in enumerate(RULES.items()):
            values = [_interval(cells[key, rule]) for key in SETS]
            rows.append(["" if number else name, label, *values, f"{means[rule]:.2f}"])
    first = _detection_rows(next(iter(MODELS)))
    counts = [first[key, GUARD] for key in SETS]
    sets = [
        f"{label} ({row['n harmful']} + {row['n harmless']})"
        for label, row in zip(SETS.values(), counts, strict=True)
    ]
    head = ["model", "rule", *sets, "mean of 8"]
    return markdown_table(head, rows, DETECTION)


def rates_table() -> str:
    """True-positive rates of the guard at two false-positive rates."""
    rows = []
    for model, name in MODELS.items():
        cells = _detection_rows(model)
        for metric in ("TPR at 5% FPR", "TPR at 1% FPR"):
            values = [_interval(cells[key, GUARD], metric) for key in SETS]
            rows.append([name, metric, *values])
    return markdown_table(["model", "rate", *SETS.values()], rows, DETECTION)


FULL_SETS = {
    "advbench + alpaca": "AdvBench",
    "catqa + alpaca": "CatQA",
    "suffix + alpaca": "suffixes",
    "template + alpaca": "templates",
    "persuasion + alpaca": "persuasion",
    "jbb": "JBB",
    "openai_moderation": "moderation",
    "xstest": "XSTest",
    "built-in pairs, test": "own pairs",
    "built-in guard prompts, test": "own guard prompts",
}
"""Set in the results -> short name, for the table of every rule."""


def every_rule_table(model: str) -> str:
    """Every rule that was tried on a model, on every set, without intervals."""
    result = read_result(f"detection-{model}")
    (summary,) = [one for one in result["tables"] if one["columns"][:2] == ["rule", "mean of 8"]]
    rows = []
    for row in summary["rows"]:
        record = dict(zip(summary["columns"], row, strict=True))
        values = [f"{record[name]:.2f}" for name in ("mean of 8", *FULL_SETS)]
        rows.append([record["rule"], *values])
    fitted = result["fitted"][GUARD]
    note = (
        f"The default reads layers {fitted['layers']} with strength {fitted['strength']:g}; "
        f"cross-validated AUROC {fitted['cross_validated_auroc']:.2f}; {result['dtype']}.\n\n"
    )
    head = ["rule", "mean of 8", *FULL_SETS.values()]
    return note + markdown_table(head, rows, DETECTION)


# ---- the service

ARMS = ("batched", "one by one", "one by one, whole passes")


def throughput_table() -> str:
    """Requests a second and delays of the service, by connections and way of scoring."""
    rows = []
    for model, name in TIMED_MODELS.items():
        slices = read_result(f"serve-throughput-{model}")["slices"]
        for arm in ARMS:
            for connections in ("1", "8", "64"):
                record = slices[f"{arm}, {connections}"]
                rate = _range(record["per_second"], 1)
                delays = [_range(record[key], 0) for key in ("p50", "p95", "p99")]
                rows.append([name, connections, arm, rate, *delays])
    head = ["model", "connections", "scored", "requests / s", "p50 ms", "p95 ms", "p99 ms"]
    return markdown_table(
        head, rows, "python benchmarks/serve.py throughput --model MODEL --guard GUARD"
    )


def upstream_table() -> str:
    """What a guard between client and upstream adds before the first piece of an answer."""
    rows = []
    for name, record in read_result("serve-upstream-smollm2-135m").items():
        if isinstance(record, dict):
            middle, low, high = record["median_added_ms"]
            added = f"{middle:.0f} [{low:.0f}, {high:.0f}]"
            rows.append([name, added, f"{record['p95_added_ms']:.0f}", str(record["pairs"])])
    head = ["the guard reads", "added, median ms", "added, p95 ms", "pairs"]
    command = "python benchmarks/serve.py upstream --guard src/latentguard/guard/default"
    return markdown_table(head, rows, command)


def _range(values: list[float], digits: int) -> str:
    middle, low, high = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} ({low}, {high})"


# ---- interventions

INTERVENTIONS = (
    "python benchmarks/interventions.py MODEL --data-dir DATA --store DIR --out FILE --only"
)
"""The command that made the results of an experiment beyond the paper; its name follows."""


def intervention_table(experiment: str, title: str, shown: Mapping[str, str]) -> str:
    """A table of an experiment's report: column of the report -> column of the page."""
    sections = read_result(f"interventions-{experiment}-qwen2.5-coder-0.5b")["sections"]
    (found,) = [one for s in sections for one in s["tables"] if one["title"] == title]
    rows = []
    for row in found["rows"]:
        record = dict(zip(found["columns"], row, strict=True))
        rows.append([_figure(record, column) for column in shown])
    return markdown_table(list(shown.values()), rows, f"{INTERVENTIONS} {experiment}")


def _figure(record: Mapping[str, Any], column: str) -> str:
    """A cell; with its interval where the two columns behind it are one."""
    value = record[column]
    if not isinstance(value, float):
        return "" if value is None else str(value)
    columns = list(record)
    ends = columns[columns.index(column) + 1 :][:2]
    if [end.split(": ")[-1] for end in ends] == ["low", "high"]:
        return format_interval(value, record[ends[0]], record[ends[1]])
    return f"{value:.2f}"


TABLES: dict[str, Callable[[], str]] = {
    **READING_TABLES,
    **REPLY_TABLES,
    **GARAK_TABLES,
    **REPLICATION_TABLES,
    **VERDICT_TABLES,
    **ADAPTATION_TABLES,
    **ATTACK_TABLES,
    **CALIBRATION_TABLES,
    **FIELD_TABLES,
    **LEVER_TABLES,
    **LIBRARY_TABLES,
    "throughput": throughput_table,
    "upstream": upstream_table,
    **{f"every-rule-{model}": partial(every_rule_table, model) for model in MODELS},
    "guards": guards_table,
    "knockout": partial(
        intervention_table,
        "knockout",
        "Attention knock-out",
        {
            "not seen": "not seen, in every block",
            "log-odds, refused harmful": "log-odds, harmful",
            "share of the gap lost": "share of the gap lost",
            "refused: refused harmful": "harmful prompts refused",
            "log-odds, accepted harmless": "log-odds, harmless",
            "refused: accepted harmless": "harmless prompts refused",
        },
    ),
    "patching": partial(
        intervention_table,
        "patching",
        "What a patch carries",
        {
            "direction": "direction",
            "place": "patched at",
            "highest at": "layer",
            "n": "pairs",
            "share carried": "share of the gap carried",
            "own group": "from the same group",
            "random direction": "random vector",
            "beyond own group": "beyond the same group",
            "judged refused": "judged refused",
        },
    ),
    "ablation": partial(
        intervention_table,
        "ablation",
        "Directional ablation",
        {
            "prompts": "prompts",
            "projected out": "projected out",
            "n": "n",
            "refused": "refused",
            "log-odds": "log-odds of refusal",
            "perplexity": "perplexity of the replies",
            "repetition": "repeated words",
        },
    ),
    "dose": partial(
        intervention_table,
        "dose",
        "Dose curves at the best layer",
        {
            "direction": "direction",
            "coefficient": "dose",
            "highest at": "layer",
            "n": "n",
            "refused": "refused",
            "fluently refused": "fluently refused",
            "random, fluently refused": "random direction, fluently refused",
            "difference": "difference",
        },
    ),
    "paper-guard": paper_guard_table,
    "controls": controls_table,
    "detection": detection_table,
    "detection-rates": rates_table,
}
"""Name on a page -> what makes the table."""


def main() -> None:
    """Write every generated table anew."""
    for page in pages_with_tables():
        page.write_text(fill_tables(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
