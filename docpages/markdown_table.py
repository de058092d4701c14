"""A result file, and a table of a page with the command that made its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def read_result(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], command: str) -> str:
    """The table, and below it the command."""
    lines = [head, ["---"] * len(head), *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\n<sub>Made by `{command}`.</sub>\n"
