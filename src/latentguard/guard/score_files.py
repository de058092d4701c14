"""Verdicts as JSON Lines: in input order, resumable, never a torn line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from latentguard.errors import PromptError
from latentguard.files import append_line, exclusive_lock, read_whole_lines, write_atomic
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, digest_prompts


def line_of(verdict: Verdict) -> str:
    """One JSON object with every field of the verdict."""
    return json.dumps(verdict.to_dict())


def score_to_file(
    guard: LatentGuard,
    backend: Backend,
    prompts: Iterable[Prompt],
    out: str | Path,
    *,
    progress: Progress | None = None,
) -> int:
    """Score prompts into ``out``; goes on where a killed run of the same guard stopped.

    Lines go to ``OUT.partial``, which is renamed when the last is written; ``OUT.partial.guard``
    holds the digests of the guard and of every prompt that was asked, never its text.

    Returns:
        How many prompts an earlier run had scored already.

    Raises:
        PromptError: if the prompts are not those that the earlier run scored, or ``out`` is a
            folder.
        LatentGuardError: if another run is writing ``out``.
    """
    if Path(out).is_dir():
        raise PromptError(f"--out should name a file for the verdicts; {out} is a folder.")
    partial, notes = Path(f"{out}.partial"), Path(f"{out}.partial.guard")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(f"{out}.partial.lock", output=out):
        return _scored(guard, backend, prompts, (partial, notes, Path(out)), progress)


def _scored(
    guard: LatentGuard,
    backend: Backend,
    prompts: Iterable[Prompt],
    files: tuple[Path, Path, Path],
    progress: Progress | None,
) -> int:
    """Go on in the partial file and its notes; how many verdicts were there."""
    partial, notes, out = files
    if not partial.exists() or read_whole_lines(notes)[:1] != [guard.digest]:
        partial.unlink(missing_ok=True)
        write_atomic(notes, f"{guard.digest}\n")
    done = len(read_whole_lines(partial))
    asked, rest = read_whole_lines(notes)[: done + 1], iter(prompts)
    if [_mark(prompt) for prompt in islice(rest, done)] != asked[1:]:
        raise PromptError(
            f"{out}.partial was written for other prompts than these; remove it to start anew."
        )
    write_atomic(notes, "".join(f"{line}\n" for line in asked))
    if done and progress is not None:
        progress(done)
    with partial.open("a", encoding="utf-8") as lines, notes.open("a", encoding="utf-8") as marks:
        for verdict in guard.scan(backend, _noted(rest, marks), progress=progress):
            append_line(lines, line_of(verdict))
    partial.replace(out)
    notes.unlink()
    return done


def _noted(prompts: Iterator[Prompt], marks: TextIO) -> Iterator[Prompt]:
    """Note each prompt before it is scored, so that no line is ever without its note."""
    for prompt in prompts:
        append_line(marks, _mark(prompt))
        yield prompt


def _mark(prompt: Prompt) -> str:
    """What tells a prompt from another, on one line."""
    return json.dumps([prompt.id, digest_prompts([prompt]), prompt.segment])
