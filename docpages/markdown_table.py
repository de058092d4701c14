"""A result file, and a table of a page with the command that made its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

MODELS = {
    "smollm2-135m": "SmolLM2-135M (`default`)",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B",
}
"""Name in the results' file names -> name on pages."""


def read_result(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], command: str) -> str:
    """The table, and below it the command."""
    lines = [head, ["---"] * len(head), *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\n<sub>Made by `{command}`.</sub>\n"
