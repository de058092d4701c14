"""Score files: verdicts as JSON Lines, in input order, resumable, never a torn line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

from latentguard.errors import PromptError
from latentguard.files import append_line, exclusive_lock, read_whole_lines, write_atomic
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, digest_prompts


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
    files = _Files(Path(out), Path(f"{out}.partial"), Path(f"{out}.partial.guard"))
    files.partial.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(f"{out}.partial.lock", output=out):
        return _resume(guard, backend, prompts, files, progress)


@dataclass(frozen=True)
class _Files:
    """Where verdicts are written, while they are and in the end."""

    out: Path
    """All verdicts."""

    partial: Path
    """Those so far."""

    digests: Path
    """Of the guard, and of each prompt that was asked."""


def _resume(
    guard: LatentGuard,
    backend: Backend,
    prompts: Iterable[Prompt],
    files: _Files,
    progress: Progress | None,
) -> int:
    """Go on in the partial file; returns how many verdicts were there."""
    if not files.partial.exists() or read_whole_lines(files.digests)[:1] != [guard.digest]:
        files.partial.unlink(missing_ok=True)
        write_atomic(files.digests, f"{guard.digest}\n")
    done = len(read_whole_lines(files.partial))
    digests = read_whole_lines(files.digests)[: done + 1]
    remaining = iter(prompts)
    if [_prompt_line(prompt) for prompt in islice(remaining, done)] != digests[1:]:
        raise PromptError(
            f"{files.partial} was written for other prompts than these; remove it to start anew."
        )
    write_atomic(files.digests, "".join(f"{line}\n" for line in digests))
    if done and progress is not None:
        progress(done)
    with (
        files.partial.open("a", encoding="utf-8") as verdicts,
        files.digests.open("a", encoding="utf-8") as asked,
    ):
        noted = _note_each(remaining, asked)
        for verdict in guard.scan(backend, noted, progress=progress):
            append_line(verdicts, json.dumps(verdict.to_dict()))
    files.partial.replace(files.out)
    files.digests.unlink()
    return done


def _note_each(prompts: Iterator[Prompt], asked: TextIO) -> Iterator[Prompt]:
    """Note each prompt before it is scored, so that no verdict is ever without its note."""
    for prompt in prompts:
        append_line(asked, _prompt_line(prompt))
        yield prompt


def _prompt_line(prompt: Prompt) -> str:
    """What distinguishes a prompt from others, on one line; not its text."""
    return json.dumps([prompt.id, digest_prompts([prompt]), prompt.segment])
