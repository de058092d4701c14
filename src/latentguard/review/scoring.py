"""Reading what is to be reviewed, and scoring it; scores are kept, so that a run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from latentguard.data.prompt_files import Columns, read_prompts, read_rows
from latentguard.errors import PromptError
from latentguard.files import append_line, read_whole_lines, write_atomic
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.review.labels import prompt_key
from latentguard.review.session import ReviewItem
from latentguard.states import Backend, Progress

AUDIT_FIELDS = frozenset({"request", "endpoint", "action", "client"})
"""What each line of the service's audit log has."""


def read_source(source: str, columns: Columns) -> list[Prompt]:
    """The prompts of a prompt file, or of an audit log that holds texts; each chat once.

    Raises:
        PromptError: if they cannot be read, or the audit log holds no texts.
    """
    rows = _audit_rows(source)
    if rows is None:
        prompts = read_prompts(source, columns=columns)
    else:
        prompts = [
            Prompt(row["text"], id=str(row["prompt"]), segment=row.get("segment"))
            for row in rows
            if isinstance(row.get("text"), str) and row["text"].strip()
        ]
        if not prompts:
            raise PromptError(
                f"{source} is an audit log that holds no texts; start the service with "
                "--audit-texts, and review what it logs from then on."
            )
    return list({prompt_key(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]


def _audit_rows(source: str) -> Iterator[Mapping[str, Any]] | None:
    """The rows of an audit log; None if this is another file, or none."""
    if not Path(source).is_file():
        return None
    rows = (row for _, _, row in read_rows(source, "text"))
    first = next(rows, None)
    if first is None or not first.keys() >= AUDIT_FIELDS:
        return None
    return chain([first], rows)


def scores_path(labels: Path) -> Path:
    """Where scores are kept, beside a label file."""
    return labels.with_name(f"{labels.name}.scores")


def score_items(
    guard: LatentGuard,
    backend: Backend,
    prompts: Sequence[Prompt],
    file: Path,
    *,
    progress: Progress,
) -> list[ReviewItem]:
    """Score prompts, in order; verdicts that an earlier run of the same guard kept are used.

    Args:
        guard: The guard.
        backend: Its model.
        prompts: What is scored.
        file: Keeps verdicts by the digest of the prompt, never its text. Its first line is the
            digest of the guard.
        progress: Called with the number of prompts that are done.
    """
    lines = read_whole_lines(file)
    if lines[:1] != [guard.digest]:
        write_atomic(file, f"{guard.digest}\n")
        lines = []
    verdicts = dict(map(_parse_line, lines[1:]))
    missing = [prompt for prompt in prompts if _line_key(prompt) not in verdicts]
    progress(len(prompts) - len(missing))
    with file.open("a", encoding="utf-8") as kept:
        scan = guard.scan(backend, missing, progress=progress)
        for prompt, verdict in zip(missing, scan, strict=True):
            verdicts[_line_key(prompt)] = verdict
            append_line(kept, json.dumps([_line_key(prompt), verdict.to_dict() | {"id": ""}]))
    digest = guard.digest
    items = []
    for prompt in prompts:
        verdict = verdicts[_line_key(prompt)]
        threshold = guard.threshold_for(prompt.segment, has_evidence=bool(verdict.evidence))
        items.append(ReviewItem(prompt, verdict, threshold, digest))
    return items


def _line_key(prompt: Prompt) -> str:
    """Names a prompt; the segment too, as it may have thresholds of its own."""
    return f"{prompt_key(prompt)} {prompt.segment or ''}".strip()


def _parse_line(line: str) -> tuple[str, Verdict]:
    key, record = json.loads(line)
    return key, Verdict.from_dict(record)
