"""A result file, and a table of a page with the command that made its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentguard.report.page_table import format_interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

MODELS = {
    "smollm2-135m": "SmolLM2-135M",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B",
}
"""Name in the results' file names -> name on pages."""

DEFAULT_GUARD = "SmolLM2-135M (`default`)"
"""The guard that comes with the package."""

GUARDS = {"default": DEFAULT_GUARD, **MODELS}
"""Name in the results' file names -> guard: that of the package, and those that ``fit`` makes."""

TIMED_MODELS = {
    "smollm2-135m": "SmolLM2-135M, float32",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B, bfloat16",
}
"""The same of the models whose speed is measured."""


def read_result(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def read_results(kind: str, names: Mapping[str, str] = MODELS) -> list[tuple[str, Any]]:
    """The name of each model that was measured, and its result file ``KIND-MODEL``."""
    return [
        (name, read_result(f"{kind}-{model}"))
        for model, name in names.items()
        if (RESULTS / f"{kind}-{model}.json").exists()
    ]


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], command: str) -> str:
    """The table, and below it the command."""
    return f"{plain_table(head, rows)}\n\n<sub>Made by `{command}`.</sub>\n"


def interval(record: Mapping[str, Any], value: str = "value", ends: str = "") -> str:
    """A figure of a record with its interval.

    Args:
        record: A row of a result file.
        value: Key of the figure.
        ends: What the keys of both ends begin with, before ``low`` and ``high``.
    """
    return format_interval(record[value], record[f"{ends}low"], record[f"{ends}high"])
