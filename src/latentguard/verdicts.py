"""Verdicts as JSON Lines: in input order, resumable, never a torn line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from latentguard.errors import PromptError
from latentguard.guard import LatentGuard, Verdict
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress


def line_of(verdict: Verdict) -> str:
    """One JSON object: id, score, probability, flagged, beliefs."""
    return json.dumps(asdict(verdict))


def score_to_file(
    guard: LatentGuard,
    backend: Backend,
    prompts: Iterable[Prompt],
    out: str | Path,
    *,
    progress: Progress | None = None,
) -> int:
    """Score prompts into ``out``; goes on where a killed run of the same guard stopped.

    Lines go to ``OUT.partial``, which is renamed when the last is written.

    Returns:
        How many prompts an earlier run had scored already.

    Raises:
        PromptError: if the prompts are not those that the earlier run scored.
    """
    partial, stamp = Path(f"{out}.partial"), Path(f"{out}.partial.guard")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not stamp.exists() or stamp.read_text() != guard.digest:
        partial.unlink(missing_ok=True)
        stamp.write_text(guard.digest)
    done = _whole_lines(partial)
    rest = _skip(iter(prompts), done, out)
    if done and progress is not None:
        progress(len(done))
    with partial.open("a", encoding="utf-8") as lines:
        for verdict in guard.scan(backend, rest, progress=progress):
            lines.write(line_of(verdict) + "\n")
            lines.flush()
    partial.replace(out)
    stamp.unlink()
    return len(done)


def _whole_lines(partial: Path) -> list[str]:
    """Ids of the lines that were written whole; a torn last line is cut off."""
    if not partial.exists():
        return []
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with partial.open("r+b") as file:
            file.truncate(len(whole))
    rows: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
    return [row["id"] for row in rows]


def _skip(prompts: Iterator[Prompt], done: list[str], out: str | Path) -> Iterator[Prompt]:
    found = [prompt.id for prompt in islice(prompts, len(done))]
    if found != done:
        raise PromptError(
            f"{out}.partial was written for other prompts than these; remove it to start anew."
        )
    return prompts
