"""Tables of long input, categories, the overhead inside vLLM, and threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

from docpages.markdown_table import (
    GUARDS,
    MODELS,
    RESULTS,
    TIMED_MODELS,
    interval,
    markdown_table,
    read_result,
)

# ---- long input

PLACES = ("start", "middle", "end", "middle, between two words")
LENGTHS = ("256", "1024")
SURROUNDINGS = ("language reference", "forum posts")
TURNS = ("turn 1 of 5", "turn 3 of 5", "turn 5 of 5")
READINGS = {
    "n-grams, worst line": "n-grams, worst line",
    "last token (default guard)": "whole (guard without chunks)",
    "pieces": "chunks",
    "windows (both readings)": "both",
}
"""Reading in the results -> name on the page."""


def long_input_table(model: str) -> str:
    """A row a place of the request; AUROC of each reading, and rates at the threshold."""
    cells = read_result(f"long-input-{model}")["cells"]
    rows = []
    for length in LENGTHS:
        for place in PLACES:
            for around in SURROUNDINGS:
                cell = cells[f"{place} {length}, {around}"]
                where = f"{place}, {cell['tokens']:,.0f} tokens"
                rows.append([where, around, *_long_cells(cell)])
    rows += [[turn, "chat", *_long_cells(cells[turn])] for turn in TURNS]
    head = [
        "request stands",
        "around it",
        "n",
        *READINGS.values(),
        "flagged: harmful",
        "flagged: harmless",
        "the most harmful chunk lies in the request",
    ]
    return markdown_table(head, rows, "python benchmarks/long_input.py MODEL")


def _long_cells(cell: Mapping[str, Any]) -> list[str]:
    figures = [cell["figures"][name]["AUROC"] for name in READINGS]
    rates = [
        cell["at_threshold"]["windows, true positives"],
        cell["at_threshold"]["windows, false positives"],
        cell["best_piece_is_in_request"],
    ]
    harmful, harmless = figures[0]["n"]
    return [f"{harmful} + {harmless}", *map(interval, [*figures, *rates])]


def long_cost_table() -> str:
    """Processor seconds of a prompt with and without chunks, by its length; and what fit adds."""
    results = {model: read_result(f"long-input-{model}") for model in MODELS}
    by_model = {model: result["cost"]["by_length"] for model, result in results.items()}
    rows = []
    for at in zip(*by_model.values(), strict=True):
        row = [f"{at[0]['tokens']:,}"]
        for one in at:
            whole, chunks = one["last"], one["windows"]
            row += [f"{whole:.1f}", f"{chunks:.1f} ({chunks / whole:.1f})"]
        rows.append(row)
    added = [
        cell for result in results.values() for cell in ("", f"{result['fit']['windows']:.0f}")
    ]
    rows.append(["added to `fit`", *added])
    names = [name.partition(" ")[0] for name in MODELS.values()]
    head = [f"{name}: {what}" for name in names for what in ("whole alone", "with chunks (ratio)")]
    return markdown_table(["tokens", *head], rows, "python benchmarks/long_input.py MODEL")


# ---- categories


def naming_table() -> str:
    """How often the nearest category is the right one."""
    results = {model: read_result(f"categories-{model}")["naming"] for model in GUARDS}
    first = next(iter(results.values()))
    sets = {
        "test split": "test split of the guard prompts, 17 categories",
        "CatQA": "CatQA, its ten categories mapped to eight",
    }
    rows = [
        [
            f"{label} (n = {_count(first[key]['guard'])})",
            *(_without_n(one[key]["guard"]) for one in results.values()),
            _without_n(first[key]["n-grams"]),
            first[key]["always the most frequent"],
            first[key]["chance among all"],
        ]
        for key, label in sets.items()
    ]
    head = ["set", *GUARDS.values(), "n-grams", "always the most frequent", "chance"]
    return markdown_table(head, rows, "python benchmarks/categories.py MODEL")


def moderation_table() -> str:
    """AUROC of one category against the rest, on OpenAI's moderation set."""
    key = "OpenAI moderation set"
    results = {
        model: read_result(f"categories-{model}")["one against the rest"][key] for model in GUARDS
    }
    first = next(iter(results.values()))
    rows = [
        [
            category,
            *(_without_n(one[category]["guard"]) for one in results.values()),
            _without_n(first[category]["n-grams"]),
            first[category]["guard"].partition(" n = ")[2],
        ]
        for category in first
    ]
    head = ["category -> ours", *GUARDS.values(), "n-grams", "n"]
    return markdown_table(head, rows, "python benchmarks/categories.py MODEL")


def _count(text: str) -> int:
    """Prompts of a figure that ends with ``n = RIGHT + WRONG``."""
    return sum(int(part) for part in text.partition(" n = ")[2].split(" + "))


def _without_n(text: str) -> str:
    return text.partition(" n = ")[0]


PACK_ROWS = (
    (0, "built-in", "none; built-in harmless calibrates"),
    (10, "built-in", "built-in harmless"),
    (50, "built-in", "built-in harmless"),
    (0, "of the set", "none; in-domain harmless calibrates"),
    (10, "of the set", "in-domain harmless"),
    (50, "of the set", "in-domain harmless"),
)
"""Examples of a category; harmless prompts that the pack sees; their name in the results."""


def packs_table() -> str:
    """Recall and false positives of packs, by examples and by the harmless prompts they see."""
    results = {model: _pack_cells(model) for model in MODELS}
    rows = []
    for k, harmless, added in PACK_ROWS:
        row = [str(k), harmless]
        for model in MODELS:
            row += [results[model][rows_of, "guard", added, k] for rows_of in PACK_TESTS]
        first = results[next(iter(MODELS))]
        row += [first[rows_of, "n-grams", added, k] for rows_of in PACK_TESTS]
        row.append(" + ".join(first[rows_of, "n", added, k] for rows_of in PACK_TESTS))
        rows.append(row)
    names = [*(name.partition(" ")[0] for name in MODELS.values()), "n-grams"]
    head = ["examples", "harmless prompts"]
    head += [f"{name}: {what}" for name in names for what in ("recall", "FPR")]
    return markdown_table([*head, "n"], rows, "python benchmarks/packs.py MODEL")


PACK_TESTS = ("all harmful", "harmless")


def _pack_cells(model: str) -> dict[tuple[str, str, str, int], str]:
    """(tested, guard or ``n``, harmless prompts, examples) -> share flagged, or their number."""
    result = read_result(f"packs-{model}")
    records = [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]
    cells = {}
    for one in records:
        cells[one["category"], one["guard"], one["added"], one["k"]] = interval(one, "flagged")
        cells[one["category"], "n", one["added"], one["k"]] = str(one["n"])
    return cells


# ---- inside vLLM


def overhead_table(kind: str = "vllm-overhead") -> str:
    """Time to the first token with scoring over without, in per cent."""
    rows = []
    for model, name in TIMED_MODELS.items():
        if not (RESULTS / f"{kind}-{model}.json").exists():
            continue
        for load, record in read_result(f"{kind}-{model}")["found"].items():
            pairs = str(record["pairs"])
            seconds = f"{record['processor_off_s']:.2f}"
            shares = [_share(record[clock]) for clock in ("processor", "wall")]
            at_once = f"{load} tokens" if load.endswith("512") else load
            rows.append([name, at_once, pairs, seconds, *shares])
    head = ["model", "at once", "pairs", "s without", "% of processor time", "% of wall time"]
    return markdown_table(head, rows, "python benchmarks/vllm_overhead.py MODEL")


def default_overhead_table() -> str:
    """The same for the reading that ``fit`` takes, in two runs."""
    rows = []
    for model, name in TIMED_MODELS.items():
        runs = [run["found"] for run in read_result(f"vllm-overhead-default-{model}")["runs"]]
        for load, record in runs[0].items():
            shares = [_share(run[load]["processor"]) if load in run else "" for run in runs]
            at_once = f"{load} tokens" if load.endswith("512") else load
            rows.append([name, at_once, str(record["pairs"]), *shares])
    head = ["model", "at once", "pairs", "% of processor time, first run", "second run"]
    return markdown_table(head, rows, "python benchmarks/vllm_overhead.py MODEL")


def _share(values: list[float]) -> str:
    middle, low, high = values
    return f"{middle:+.1f} [{low:.1f}, {high:.1f}]"


# ---- threads and processes


def reading_speed_table() -> str:
    """A row a way to read; time over one thread's, idle and on a busy machine."""
    records = [read_result(f"reading-speed-{kind}smollm2-135m") for kind in ("", "busy-")]
    rows = []
    for name in ("one thread", "2 threads", "two processes"):
        arms = [record["arms"][name] for record in records]
        rows.append([name, *(cell for arm in arms for cell in _time_ratios(arm))])
    n = [f"n = {record['rows']}" for record in records]
    head = ["", f"idle: time ({n[0]})", "processor time", f"busy: time ({n[1]})", "processor time"]
    return markdown_table(head, rows, "python benchmarks/reading_speed.py --out FILE [--busy 2]")


def _time_ratios(arm: Mapping[str, Any]) -> list[str]:
    """Median and range of wall time and of processor time over one thread's in the same round."""
    ratios = [sorted(arm[f"{clock}_ratios"]) for clock in ("wall", "cpu")]
    return [f"{median(r):.2f} ({r[0]:.2f}-{r[-1]:.2f})" for r in ratios]


READING_TABLES: dict[str, Callable[[], str]] = {
    **{f"long-input-{model}": partial(long_input_table, model) for model in MODELS},
    "long-input-cost": long_cost_table,
    "categories-naming": naming_table,
    "categories-moderation": moderation_table,
    "packs": packs_table,
    "vllm-overhead": overhead_table,
    "vllm-overhead-attended": partial(overhead_table, "vllm-overhead-attended"),
    "vllm-overhead-default": default_overhead_table,
    "reading-speed": reading_speed_table,
}
"""Name on a page -> what makes the table."""
